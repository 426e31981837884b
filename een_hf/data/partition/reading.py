"""Loading of a partition from its files."""

import json
import os
import reprlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...errors import in_one_line
from ..task import DataError
from .layout import FOLDERS, FORMATS, PARTITION_FILE, sha256


def load_partition(folder: str | os.PathLike, partition_id: int | str) -> datasets.DatasetDict:
    """Load one part of a partitioned data set, or the union of all parts.

    The features are those of the data set; npz files have only the input columns and the label.

    Args:
        folder: the output folder of `een-hf partition`.
        partition_id: 0-based number of a part, or `all`.

    Returns:
        the splits `train` and, unless the parts were made with `--valid_fraction 0`, `validation`.

    Raises:
        DataError: a folder without a partition, a part that does not exist, or a file that cannot be read or is not
            the one that partition.json describes.
    """
    folder = Path(folder)
    about, features = _read_partition_file(folder)
    parts = _part_numbers(partition_id, about["num_partitions"])
    read = _read_npz if about["format"] == "npz" else _read_parquet
    splits = {}
    for split, sizes in about["sizes"].items():
        tables = []
        for part in parts:
            path = folder / FOLDERS[split] / f"{part}.{about['format']}"
            try:
                if about.get("sha256") and sha256(path) != about["sha256"][split][part]:
                    raise DataError(f"it is not the file that {PARTITION_FILE} was written for.")
                table = read(path, about, features)
                if not table.schema.equals(features.arrow_schema):
                    table = table.cast(features.arrow_schema)
            except Exception as error:  # a damaged file raises errors of many kinds
                wrong = error if isinstance(error, DataError) else in_one_line(error)
                raise DataError(f"--partition_dir {folder}: {path} cannot be read: {wrong}") from error
            if len(table) != sizes[part]:
                raise DataError(
                    f"--partition_dir {folder}: {path} holds {len(table)} rows, {PARTITION_FILE} says {sizes[part]}: "
                    "they are of different partitions."
                )
            tables.append(table)
        table = pa.concat_tables(tables).replace_schema_metadata(features.arrow_schema.metadata)
        splits[split] = datasets.Dataset(table)
    return datasets.DatasetDict(splits)


def partition_labels(folder: str | os.PathLike, column: str) -> tuple[str, ...] | None:
    """The label names of all parts, in the order of their ids; `None` if this is not the partition's label column.

    Since a part may lack some classes, models of different parts have the same labels only by these names.
    """
    about, _ = _read_partition_file(Path(folder))
    return tuple(about["label_names"]) if about["label_column"] == column else None


def _read_partition_file(folder: Path) -> tuple[dict, datasets.Features]:
    """The content of partition.json, after checks, and the features of the rows."""
    path = folder / PARTITION_FILE
    if not path.is_file():
        raise DataError(f"--partition_dir {folder} holds no {PARTITION_FILE}: make one by `een-hf partition`.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--partition_dir {folder}: {PARTITION_FILE} cannot be read: {in_one_line(error)}") from error
    missing = [
        key
        for key in ("format", "num_partitions", "sizes", "features", "label_column", "label_names", "input_columns")
        if not isinstance(about, dict) or key not in about
    ]
    if missing:
        raise DataError(f"--partition_dir {folder}: {PARTITION_FILE} does not name {', '.join(missing)}.")
    try:
        features = datasets.Features.from_dict(about["features"])
        features.arrow_schema  # noqa: B018  names types, which may be none
    except Exception as error:
        raise DataError(
            f"--partition_dir {folder}: {PARTITION_FILE}, features cannot be read: {in_one_line(error)}"
        ) from error
    wrong = [key for key, fits in _partition_kinds(about, features).items() if not fits]
    if wrong:
        raise DataError(
            f"--partition_dir {folder}: {PARTITION_FILE}, {wrong[0]} is {reprlib.repr(about.get(wrong[0]))}, which "
            "cannot be."
        )
    return about, features


def _partition_kinds(about: dict, features: datasets.Features) -> dict[str, bool]:
    """Whether each value of partition.json is of its kind and fits the others."""

    def is_count(value, least=0) -> bool:
        return type(value) is int and least <= value < 2**62

    def are_names(value, known) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(isinstance(n, str) and n in known for n in value)

    number, sizes, inputs = about["num_partitions"], about["sizes"], about["input_columns"]
    label, names, digests = about["label_column"], about["label_names"], about.get("sha256")
    return {
        "format": about["format"] in FORMATS,
        "num_partitions": is_count(number, 1),
        "sizes": isinstance(sizes, dict)
        and {"train"} <= sizes.keys() <= FOLDERS.keys()
        and all(isinstance(s, list) and len(s) == number and all(map(is_count, s)) for s in sizes.values()),
        "label_column": isinstance(label, str) and label in features,
        "label_names": isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names),
        "input_columns": are_names(inputs, features) if about["format"] == "npz" else True,
        "sha256": digests is None  # of a partition by an earlier version
        or isinstance(digests, dict)
        and isinstance(sizes, dict)
        and digests.keys() == sizes.keys()
        and all(isinstance(of_split, list) and len(of_split) == number for of_split in digests.values()),
    }


def _part_numbers(partition_id: int | str, num_partitions: int) -> list[int]:
    if partition_id == "all":
        return list(range(num_partitions))
    if not str(partition_id).isdecimal() or int(partition_id) >= num_partitions:
        raise DataError(
            f"--partition_id must be a number from 0 to {num_partitions - 1}, or `all`, not {partition_id!r}."
        )
    return [int(partition_id)]


def _read_parquet(path: Path, about: dict, features: datasets.Features) -> pa.Table:
    return pq.read_table(path, partitioning=None)


def _read_npz(path: Path, about: dict, features: datasets.Features) -> pa.Table:
    with np.load(path, allow_pickle=False) as arrays:
        x, y = arrays["x"], arrays["y"]
    inputs, label_column = about["input_columns"], about["label_column"]
    if isinstance(features[inputs[0]], datasets.Image):
        columns = {inputs[0]: [Image.fromarray(pixels) for pixels in x]}
    else:
        columns = dict(zip(inputs, x.reshape(len(x), -1).T.tolist(), strict=True))
    classes = datasets.ClassLabel(names=about["label_names"])
    rows = datasets.Dataset.from_dict(
        {**columns, label_column: y}, datasets.Features({**features, label_column: classes})
    )
    if isinstance(features[label_column], datasets.ClassLabel):
        return rows.data.table
    # Labels without ids of their own were written as ids into the names.
    names = [about["label_names"][label] for label in y]
    rows = rows.remove_columns(label_column).add_column(label_column, names, feature=datasets.Value("string"))
    return rows.cast_column(label_column, features[label_column]).data.table
