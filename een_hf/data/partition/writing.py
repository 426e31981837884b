"""Writing of a partition: all of its files, or none."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.table import embed_table_storage

from ...errors import make_folder
from ...files import locked
from ..decoding import decode_image
from ..sources import check_columns
from ..task import DataError, is_text_column
from .layout import FOLDERS, FORMATS, PARTITION_FILE, PLOT_FILE, sha256
from .plot import plot_partition
from .rows import LabelledRows


_MARK = ".unfinished"  # in a folder whose files are not complete yet
_FILES = {*FOLDERS.values(), PARTITION_FILE, PLOT_FILE, _MARK}


def write_partition(
    data: LabelledRows,
    parts: Sequence[np.ndarray],
    output_dir: str | os.PathLike,
    *,
    format: str = "parquet",
    valid_fraction: float = 0.25,
    input_column_names: Sequence[str] | None = None,
    shares: np.ndarray | None = None,
    settings: dict | None = None,
) -> dict:
    """Write `train/<part>` and `valid/<part>` files, partition.json and partition.png; all of them or none.

    The first rows of a part, `valid_fraction` of them rounded down, are its validation rows. partition.json, without
    which nothing is loaded, is written last; the files of a process that was killed are removed by the next one.

    Args:
        data: the rows.
        parts: numbers of the rows of each part, in random order, from `partition_indices`.
        output_dir: a folder that is empty or does not exist.
        format: `parquet` with all columns, images in their encoded bytes, or `npz` with `x` and `y`.
        valid_fraction: at least 0, below 1; with 0 there are no `valid` files.
        input_column_names: for npz: one image column, or one or two text columns. Default: the only ones.
        shares: Dirichlet shares (parts, classes that occur).
        settings: further content of partition.json.

    Returns:
        the content of partition.json.

    Raises:
        DataError: a folder that is not empty, or rows that npz cannot store.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir)
    if format not in FORMATS:
        raise DataError(f"--format {format!r} is not one of: {', '.join(FORMATS)}.")
    check_valid_fraction(valid_fraction)
    rows, columns = data.rows, data.rows.column_names
    write, inputs = _write_parquet, None
    if format == "npz":
        inputs = _input_columns(data, input_column_names)
        columns = [*inputs, data.label_column]
        write = _npz_writer(data, inputs)
    num_valid = [math.floor(len(part) * valid_fraction + 1e-9) for part in parts]
    split_rows = {"train": [part[count:] for part, count in zip(parts, num_valid, strict=True)]}
    if valid_fraction:
        split_rows["validation"] = [part[:count] for part, count in zip(parts, num_valid, strict=True)]
    num_classes = len(data.label_names)
    counts = np.array([np.bincount(data.labels[part], minlength=num_classes) for part in parts])
    about = {
        **(settings or {}),
        "format": format,
        "valid_fraction": valid_fraction,
        "num_partitions": len(parts),
        "sizes": {split: [len(part) for part in indices] for split, indices in split_rows.items()},
        "label_column": data.label_column,
        "input_columns": inputs,
        "columns": columns,
        "label_names": data.label_names,
        "features": datasets.Features({name: rows.features[name] for name in columns}).to_dict(),
        "label_counts": counts.tolist(),
        "sha256": {},
    }
    if shares is not None:
        of_all = np.zeros(counts.shape)
        of_all[:, np.unique(data.labels)] = shares
        about["label_shares"] = of_all.tolist()

    with _unfinished(output_dir):
        for split, indices in split_rows.items():
            folder = output_dir / FOLDERS[split]
            folder.mkdir()
            for part, numbers in enumerate(indices):
                write(rows, numbers, folder / f"{part}.{format}")
            about["sha256"][split] = [sha256(folder / f"{part}.{format}") for part in range(len(indices))]
        plot_partition(counts, data.label_names, output_dir / PLOT_FILE)
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        (output_dir / PARTITION_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return about


def check_valid_fraction(share: float) -> None:
    """Raise DataError for a share that leaves no training rows, or is no share."""
    if not 0 <= share < 1:
        raise DataError(f"--valid_fraction must be at least 0 and below 1, not {share}.")


def check_output_dir(folder: str | os.PathLike) -> None:
    """Raise DataError if files would be overwritten, other than those of a process that was killed."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"--output_dir {folder} is a link to nothing: make the folder that it names, or give another.")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output_dir {folder} is not an empty folder but a file: give another.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found - (_FILES if _MARK in found else set()):
        raise DataError(f"--output_dir {folder} exists and is not an empty folder: give another, or remove it.")


@contextmanager
def _unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder as unfinished while it is written; after an error its former state is restored.

    Raises:
        DataError: another process is writing there.
    """
    new = not folder.exists()
    make_folder("output_dir", folder)
    (folder / _MARK).touch()
    with locked(folder / _MARK, DataError(f"--output_dir {folder}: another process writes a partition there.")):
        try:
            _remove(folder, _FILES - {_MARK})
            yield
        except BaseException:
            _remove(folder, _FILES)
            if new:
                folder.rmdir()
            raise
        (folder / _MARK).unlink()


def _remove(folder: Path, names: set[str]) -> None:
    for path in (folder / name for name in names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_parquet(rows: datasets.Dataset, numbers: np.ndarray, path: Path) -> None:
    table = embed_table_storage(rows.with_format("arrow")[numbers.tolist()])
    table = table.replace_schema_metadata(rows.features.arrow_schema.metadata)
    pq.write_table(table, path)


def _input_columns(data: LabelledRows, names: Sequence[str] | None) -> list[str]:
    """One image column, or one or two text columns."""
    features = data.rows.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    texts = [name for name, feature in features.items() if name != data.label_column and is_text_column(feature)]
    if names is not None:
        check_columns(data.rows, names, "input_column_names", "The data set")
    chosen = list(names or images or texts)
    if len(chosen) == 1 and chosen[0] in images or 1 <= len(chosen) <= 2 and set(chosen) <= set(texts):
        return chosen
    raise DataError(
        f"--format npz takes one image column or one or two text columns; the data set has images in: "
        f"{', '.join(images) or 'none'}, text in: {', '.join(texts) or 'none'}. Choose by --input_column_names, or "
        "give --format parquet, which keeps all columns."
    )


def _npz_writer(data: LabelledRows, inputs: list[str]) -> Callable:
    """A writer of `x` and `y`; an image must be like the first one, so that all parts are of one shape."""
    is_image = isinstance(data.rows.features[inputs[0]], datasets.Image)
    columns = data.rows.select_columns(inputs)
    if is_image:
        columns = columns.cast_column(inputs[0], datasets.Image(decode=False))
        shape = _image_array(columns, 0, inputs[0]).shape

    def write(_, numbers: np.ndarray, path: Path) -> None:
        if is_image:
            x = np.empty((len(numbers), *shape), dtype=np.uint8)
            for position, number in enumerate(numbers.tolist()):
                pixels = _image_array(columns, number, inputs[0])
                if pixels.shape != shape:
                    raise DataError(
                        f"--format npz holds images of one shape: that of row {number} is {pixels.shape}, that of "
                        f"row 0 {shape}. Give --format parquet."
                    )
                x[position] = pixels
        else:
            x = _text_array(columns[numbers.tolist()], inputs)
        np.savez_compressed(path, x=x, y=data.labels[numbers])

    return write


def _image_array(rows: datasets.Dataset, number: int, column: str) -> np.ndarray:
    """Pixels of one image: (height, width) for grey, else with 3 or 4 channels last."""
    encoded = rows[number][column]
    image, problem = (None, "there is no image") if encoded is None else decode_image(encoded)
    if problem:
        raise DataError(f"--format npz: row {number} (counted from 0) has an image that cannot be read: {problem}.")
    return np.asarray(image)


def _text_array(texts: dict[str, list], inputs: list[str]) -> np.ndarray:
    for name in inputs:
        if None in texts[name]:
            raise DataError(f"--format npz: column {name!r} has rows without text. Give --format parquet.")
    x = np.stack([np.array(texts[name], dtype=str) for name in inputs], axis=1)
    if x.T.tolist() != [texts[name] for name in inputs]:
        raise DataError("--format npz cannot hold text that ends in a null character. Give --format parquet.")
    return x[:, 0] if len(inputs) == 1 else x
