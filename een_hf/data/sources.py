"""Where data come from: the Hub, folders and files, each error naming the flag."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from .csv_files import check_text_file, csv_settings
from .task import DataError


FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROW_ID = "idx"
_LOAD_ERRORS = (OSError, ValueError, DatasetsError)


def load_hub(
    name: str, config: str | None, source: str, cache_dir: str | None, token: str | None, streaming: bool = False
) -> dict:
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise DataError(f"{source}: there is no such folder.")
    try:
        return dict(datasets.load_dataset(name, config, cache_dir=cache_dir, token=token, streaming=streaming))
    except _LOAD_ERRORS as error:
        raise DataError(
            f"{source} cannot be loaded from the Hub ({error}). Without network give --dataset_name a local folder of "
            "parquet files, or the rows themselves: --train_file for text, --train_dir for images."
        ) from error


def parquet_files(folder: Path, config: str | None, source: str) -> dict[str, list[str]]:
    """Parquet files by split (`train-00000-of-00001.parquet`, `train.parquet`), in the folder or as the Hub nests."""
    places = [*([folder / config, folder / "data" / config] if config else []), folder, folder / "data"]
    for place in places:
        found: dict[str, list[str]] = {}
        for path in sorted(place.glob("*.parquet")):
            found.setdefault(path.stem.split("-")[0], []).append(str(path))
        if found:
            return found
    raise DataError(
        f"{source} holds no parquet file, neither itself nor in: {', '.join(p.name for p in places[:-1])}."
    )


def load_files(
    files: dict[str, list[str]],
    source: str,
    cache_dir: str | None,
    streaming: bool = False,
    text_columns: Sequence[str] = (),
) -> dict:
    """Rows by split of files by split, all of one format; `text_columns` are text whatever a csv file holds there."""
    kind = FILE_FORMATS[Path(next(iter(files.values()))[0]).suffix]
    settings, splits = {"cache_dir": cache_dir, "streaming": streaming, "split": "train"}, {}
    for split, paths in files.items():
        if kind in ("csv", "json"):
            (path,) = paths
            check_text_file(path, source, to_the_end=kind == "json" and not streaming)
        if kind == "csv":
            settings |= csv_settings(path, source, text_columns, streaming)
        try:
            splits[split] = datasets.load_dataset(kind, data_files=[glob.escape(path) for path in paths], **settings)
        except _LOAD_ERRORS as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"{source} has no rows: give a file with rows.") from error
            raise DataError(f"{source} cannot be read as {kind}: {error.__cause__ or error}") from error
    return splits


def load_image_folder(
    path: str, source: str, cache_dir: str | None, streaming: bool = False, labelled: bool = False
) -> dict:
    """Images in one folder per class, below one folder per split where these are named so.

    By itself `datasets` takes a single folder for no class; where the images are `labelled`, it is one.
    """
    single = [entry for entry in os.scandir(path) if entry.is_dir()] if labelled and os.path.isdir(path) else []
    is_class = len(single) == 1 and {entry.is_file() for entry in os.scandir(single[0])} == {True}
    settings = {"cache_dir": cache_dir, "streaming": streaming, "drop_labels": False if is_class else None}
    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=glob.escape(path), **settings))
    except _LOAD_ERRORS as error:
        raise DataError(f"{source} cannot be read as images in folders: {error.__cause__ or error}") from error


def check_columns(rows: datasets.Dataset, columns: Sequence[str], flag: str, where: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; its columns are: {', '.join(rows.column_names)}. "
            f"Name one by --{flag}."
        )


def limit_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
