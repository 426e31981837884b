"""Data: tasks of texts and images, partitions, and small real samples from installed packages."""

from ..extras import named_extras


with named_extras():
    from .partition import load_partition, partition_dataset, partition_indices
    from .samples import load_bbc_news, load_digits, sample_model_path
    from .task import DataError, TaskData
    from .text import encode_text_data, load_text_data
    from .text_arguments import TextDataArguments

__all__ = [
    "DataError",
    "TaskData",
    "TextDataArguments",
    "encode_text_data",
    "load_bbc_news",
    "load_digits",
    "load_partition",
    "load_text_data",
    "partition_dataset",
    "partition_indices",
    "sample_model_path",
]
