"""Partitions: a labelled data set cut into IID or non-IID parts, as files, and back.

`assignment` decides which row goes where, `rows` finds the data set, `writing` and `reading` know the files (`layout`
says how they are called), `plot` draws them; `dataset` does all of it.
"""

from .assignment import SCHEMES, partition_indices
from .dataset import partition_dataset
from .layout import FORMATS, PARTITION_FILE
from .plot import plot_partition
from .reading import load_partition, partition_labels
from .rows import LabelledRows, load_labelled_rows
from .writing import check_output_dir, write_partition


__all__ = [
    "FORMATS",
    "LabelledRows",
    "PARTITION_FILE",
    "SCHEMES",
    "check_output_dir",
    "load_labelled_rows",
    "load_partition",
    "partition_dataset",
    "partition_indices",
    "partition_labels",
    "plot_partition",
    "write_partition",
]
