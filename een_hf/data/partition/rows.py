"""The rows that are divided into parts."""

from dataclasses import dataclass

import datasets
import numpy as np

from ..labels import SINGLE_LABEL, find_label_column, resolve_labels
from ..sources import check_columns, check_paths, check_splits, load_named, load_paths
from ..task import DataError


@dataclass
class LabelledRows:
    """The train split of a data set with one class per row.

    Args:
        rows: all columns, with the features of the data set.
        label_column: column of the labels.
        labels: (n,) class ids.
        label_names: by class id.
    """

    rows: datasets.Dataset
    label_column: str
    labels: np.ndarray
    label_names: list[str]


def load_labelled_rows(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    label_column_name: str | None = None,
    *,
    train_file: str | None = None,
    train_dir: str | None = None,
    train_dataset: datasets.Dataset | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> LabelledRows:
    """Load the train split of a data set from one of these sources.

    Args:
        dataset_name: Hub name, folder of parquet files (also below it) or of images, or an installed sample.
        dataset_config_name: configuration of `dataset_name`.
        label_column_name: column of the labels; default: the first of `label`, `fine_label`, `labels`.
        train_file: csv, json, jsonl or parquet.
        train_dir: images, one folder per class.
        train_dataset: the rows themselves, instead of a source.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.

    Returns:
        the rows with their class ids.

    Raises:
        DataError: a source, split or column that is missing, or labels that are no classes.
    """
    given = {"dataset_name": dataset_name, "train_file": train_file, "train_dir": train_dir}
    given["train_dataset"] = train_dataset
    given = {flag: value for flag, value in given.items() if value is not None}
    if len(given) != 1:
        raise DataError(
            "Give the rows by one of --dataset_name, --train_file and --train_dir, not by "
            f"{' and '.join(f'--{flag}' for flag in given) or 'none'}."
        )
    ((flag, name),) = given.items()
    source = "train_dataset" if flag == "train_dataset" else f"--{flag} {name}"
    if flag == "train_dataset":
        splits = {"train": train_dataset}
    elif flag == "dataset_name":
        splits = load_named(name, dataset_config_name, source, cache_dir=cache_dir, token=token, only=["train"])
        check_splits(splits, ["train"], {"train": "the parts are cut from it; give other data"}, source)
    else:
        kind = flag.removeprefix("train_")
        check_paths({"train": name}, kind)
        splits = load_paths({"train": name}, kind, cache_dir=cache_dir)
    rows = splits["train"]
    column = find_label_column({"train": rows}, label_column_name)
    check_columns(rows, [column], "label_column_name", f"{source}, split 'train'")
    resolved, problem_type, names = resolve_labels({"train": rows}, column, None, source)
    if problem_type != SINGLE_LABEL:
        raise DataError(
            f"{source}: column {column!r} ({problem_type}) does not have one class per row: name another by "
            "--label_column_name."
        )
    return LabelledRows(rows, column, np.asarray(resolved["train"][column][:]), names)
