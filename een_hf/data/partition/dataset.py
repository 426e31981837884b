"""`partition_dataset`: loads the rows, assigns them to parts, and writes the parts."""

import math
import os
from collections.abc import Sequence
from typing import Any

import datasets

from ..task import DataError
from .assignment import partition_indices
from .rows import load_labelled_rows
from .writing import check_output_dir, check_valid_fraction, write_partition


def partition_dataset(
    train_dataset: datasets.Dataset | None = None,
    *,
    output_dir: str | os.PathLike,
    num_partitions: int,
    scheme: str,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    train_dir: str | None = None,
    label_column_name: str | None = None,
    input_column_names: Sequence[str] | None = None,
    alpha: float | None = None,
    classes_per_partition: int | None = None,
    balance: bool = False,
    min_size: int | None = None,
    valid_fraction: float = 0.25,
    format: str = "parquet",
    seed: int = 42,
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Divide a labelled data set into IID or non-IID parts, as the command `een-hf partition` does.

    Args:
        train_dataset: rows with one class each; `dataset_name`, `train_file` or `train_dir` may name them instead.
        output_dir: a folder that is empty or does not exist.
        num_partitions: number of parts.
        scheme: `iid`, `dir` (Dirichlet shares of the classes) or `pat` (a few classes in each part).
        dataset_name: Hub name, folder of parquet files or of images, or an installed sample.
        dataset_config_name: configuration of `dataset_name`.
        train_file: csv, json, jsonl or parquet.
        train_dir: images, one folder per class.
        label_column_name: column of the labels; default: the first of `label`, `fine_label`, `labels`.
        input_column_names: for `format="npz"`: one image column, or one or two text columns.
        alpha: for `dir`: concentration of the Dirichlet distribution; the smaller, the fewer classes in a part.
            Default: 0.1.
        classes_per_partition: for `pat`: number of classes in each part; default: 2.
        balance: whether parts have equal size.
        min_size: smallest number of rows of a part; default: as many as are needed for one validation row.
        valid_fraction: validation share of each part; 0: none.
        format: `parquet` (all columns) or `npz` (arrays x and y).
        seed: seed of all random draws.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.

    Returns:
        the content of partition.json.

    Raises:
        DataError: rows that are missing, a value out of range, or parts that cannot be made from these rows.

    Example:
        >>> about = een_hf.partition_dataset(rows_with_labels, output_dir="parts", num_partitions=3, scheme="iid")
        >>> part = een_hf.data.load_partition("parts", 0)["train"]
    """
    check_output_dir(output_dir)
    for name, value, owner in (("alpha", alpha, "dir"), ("classes_per_partition", classes_per_partition, "pat")):
        if value is not None and scheme != owner:
            raise DataError(f"--{name} belongs to --scheme {owner}, not {scheme}.")
    if dataset_config_name is not None and dataset_name is None:
        raise DataError("--dataset_config_name belongs to --dataset_name.")
    check_valid_fraction(valid_fraction)
    if seed < 0:
        raise DataError(f"--seed must be at least 0, not {seed}.")
    if min_size is None:
        min_size = math.ceil(1 / valid_fraction - 1e-9) if valid_fraction else 1
    settings = {"scheme": scheme, "balance": balance, "min_size": min_size, "seed": seed}
    if scheme == "dir":
        settings["alpha"] = 0.1 if alpha is None else alpha
    if scheme == "pat":
        settings["classes_per_partition"] = 2 if classes_per_partition is None else classes_per_partition
    names = {"train_file": train_file, "train_dir": train_dir}
    hub = {"train_dataset": train_dataset, "cache_dir": cache_dir, "token": token}
    data = load_labelled_rows(dataset_name, dataset_config_name, label_column_name, **names, **hub)
    parts, shares = partition_indices(data.labels, num_partitions, **settings)
    source = {"dataset_name": dataset_name, "dataset_config_name": dataset_config_name, **names}
    return write_partition(
        data,
        parts,
        output_dir,
        format=format,
        valid_fraction=valid_fraction,
        input_column_names=input_column_names,
        shares=shares,
        settings={**source, **settings},
    )
