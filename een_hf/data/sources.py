"""Loading of data from the Hub, from folders and from files; errors name the flag."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from ..errors import in_one_line
from .csv_files import check_text_file, csv_settings
from .samples import load_bbc_news, load_digits
from .task import DataError


HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
# Their splits are fixed: otherwise a checkpoint that is evaluated with another --seed could see its training rows.
SAMPLES = {"bbc_news": load_bbc_news, "digits": load_digits}
FILE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_LOAD_ERRORS = (OSError, ValueError, DatasetsError)


def load_named(
    name: str,
    config: str | None,
    source: str,
    *,
    cache_dir: str | None = None,
    token: str | None = None,
    streaming: bool = False,
    images: bool = True,
    only: Sequence[str] | None = None,
) -> dict:
    """Load all splits of a data set from a local folder, an installed sample, or the Hub.

    Args:
        name: the value of `--dataset_name`.
        config: configuration of the data set.
        source: name of the data in messages.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.
        streaming: whether to stream the rows instead of loading them into memory.
        images: whether a folder without parquet files may contain images, in one folder per class.
        only: splits that must exist; of parquet files only these are read. `None`: all splits.

    Returns:
        the splits by name.

    Raises:
        DataError: a data set that does not exist or cannot be read.
    """
    if os.path.isdir(name):
        folder = Path(name)
        if images and config is None and any(folder.iterdir()) and not any(folder.rglob("*.parquet")):
            return load_image_folder(name, source, cache_dir, streaming)
        files = _parquet_files_below(folder, config, source)
        if only is not None:
            check_splits(files, only, {}, source)
            files = {split: files[split] for split in only}
        return load_files(files, source, cache_dir, streaming)
    if name in SAMPLES:
        return dict(SAMPLES[name]())
    return load_hub(HUB_NAMES.get(name, name), config, source, cache_dir, token, streaming)


def load_paths(
    paths: dict[str, str],
    kind: str,
    *,
    cache_dir: str | None = None,
    streaming: bool = False,
    text_columns: Sequence[str] = (),
) -> dict:
    """Load the rows of one file or folder for each split.

    Args:
        paths: path by split.
        kind: `file` (csv, json, jsonl or parquet) or `dir` (images, in one folder per class; `test` needs no folders).
        cache_dir: folder for caches.
        streaming: whether to stream the rows instead of loading them into memory.
        text_columns: columns of csv files that are always text.

    Returns:
        the splits by name.
    """
    if kind == "file":
        return {
            split: load_files({split: [path]}, f"--{split}_file {path}", cache_dir, streaming, text_columns)[split]
            for split, path in paths.items()
        }
    source = " ".join(f"--{split}_dir {path}" for split, path in paths.items())
    return {
        split: load_image_folder(path, source, cache_dir, streaming, labelled=split != "test")["train"]
        for split, path in paths.items()
    }


def check_paths(paths: dict[str, str], kind: str) -> None:
    """Raise DataError for a file (`kind` is `file`) or folder (`dir`) that does not exist or has an unknown format."""
    for split, path in paths.items():
        if kind == "file" and Path(path).suffix not in FILE_FORMATS:
            raise DataError(f"--{split}_file {path} must end in one of: {', '.join(sorted(FILE_FORMATS))}.")
        if not (os.path.isfile if kind == "file" else os.path.isdir)(path):
            raise DataError(f"--{split}_{kind} {path} does not exist.")


def check_splits(splits: dict, needed: Iterable[str], hints: dict[str, str], source: str) -> None:
    """Raise DataError if a needed split is missing; the message says how to provide it."""
    for split in needed:
        if split not in splits:
            there = ", ".join(sorted(splits)) or "none"
            raise DataError(f"{source} has no {split} split (it has: {there}): {hints.get(split, 'give other data')}.")


def _parquet_files_below(folder: Path, config: str | None, source: str) -> dict[str, list[str]]:
    """Parquet files by split: in the folder, in the Hub's layout, or in the only folder below it that has any."""
    try:
        return parquet_files(folder, config, source)
    except DataError:
        folders = sorted({path.parent for path in folder.rglob("*.parquet")})
        if not folders or config is not None:
            raise
    if len(folders) > 1:
        raise DataError(f"{source} holds several data sets ({', '.join(map(str, folders))}): give one of them.")
    return parquet_files(folders[0], None, source)


def load_hub(
    name: str, config: str | None, source: str, cache_dir: str | None, token: str | None, streaming: bool = False
) -> dict:
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise DataError(f"{source}: there is no such folder.")
    try:
        return dict(datasets.load_dataset(name, config, cache_dir=cache_dir, token=token, streaming=streaming))
    except _LOAD_ERRORS as error:
        raise DataError(
            f"{source} cannot be loaded from the Hub ({in_one_line(error)}). Without network give --dataset_name a "
            "local folder of parquet files, or the rows themselves: --train_file for text, --train_dir for images."
        ) from error


def parquet_files(folder: Path, config: str | None, source: str) -> dict[str, list[str]]:
    """Parquet files by split (`train-00000-of-00001.parquet`, `train.parquet`), also in the layout of the Hub."""
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
    """Load rows by split from files by split, all of one format; `text_columns` of csv files are always text."""
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
            # Of an empty json and an empty parquet file.
            if any(text in f"{error} {error.__cause__}" for text in ("corresponds to no data", "BatchSize must be")):
                raise DataError(f"{source} has no rows: give a file with rows.") from error
            raise DataError(f"{source} cannot be read as {kind}: {in_one_line(error.__cause__ or error)}") from error
    return splits


def load_image_folder(
    path: str, source: str, cache_dir: str | None, streaming: bool = False, labelled: bool = False
) -> dict:
    """Load images from one folder per class, which may be inside one folder per split.

    By default `datasets` does not take a single folder as a class; if the images are `labelled`, it is one.
    """
    single = [entry for entry in os.scandir(path) if entry.is_dir()] if labelled and os.path.isdir(path) else []
    is_class = len(single) == 1 and {entry.is_file() for entry in os.scandir(single[0])} == {True}
    settings = {"cache_dir": cache_dir, "streaming": streaming, "drop_labels": False if is_class else None}
    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=glob.escape(path), **settings))
    except _LOAD_ERRORS as error:
        raise DataError(
            f"{source} cannot be read as images in folders: {in_one_line(error.__cause__ or error)}"
        ) from error


def check_columns(rows: datasets.Dataset, columns: Sequence[str], flag: str, where: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; its columns are: {', '.join(rows.column_names)}. "
            f"Name one by --{flag}."
        )


def limit_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
