"""Partitions: a labelled data set cut into IID or non-IID parts, as files, and back."""

import hashlib
import heapq
import json
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from PIL import Image


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..errors import in_one_line
from .images import decode_image
from .labels import SINGLE_LABEL, resolve_labels
from .samples import load_bbc_news, load_digits
from .sources import FILE_FORMATS, check_columns, load_files, load_hub, load_image_folder, parquet_files
from .task import DataError, check_splits


SCHEMES = ("iid", "dir", "pat")
FORMATS = ("parquet", "npz")
PARTITION_FILE = "partition.json"
_SAMPLES = {"bbc_news": load_bbc_news, "digits": load_digits}
_LABEL_COLUMNS = ("label", "fine_label")
_FOLDERS = {"train": "train", "validation": "valid"}
_PLOT_FILE = "partition.png"
_MARK = ".unfinished"  # in a folder whose files are not all there yet
_FILES = {*_FOLDERS.values(), PARTITION_FILE, _PLOT_FILE, _MARK}
# Spread of unbalanced sizes: one part in six has less than 0.22 and one in six more than 1.6 times the mean.
_SIZE_SIGMA = 1.0
_MAX_ALPHA = 1e9


# Which row goes where


def partition_indices(
    labels: Sequence | np.ndarray,
    num_partitions: int,
    scheme: str,
    *,
    alpha: float = 0.1,
    classes_per_partition: int = 2,
    balance: bool = False,
    min_size: int = 1,
    seed: int = 42,
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Deal every row to one part.

    `iid`: by chance. `dir`: each part draws shares of the classes from a symmetric Dirichlet distribution, and the
    classes of its rows from these shares. All parts draw at once; where a class is drawn more often than it has rows,
    chance decides which draws get them, and the others are drawn again, by the same shares over the classes that
    still have rows (by the rows left, where these shares are zero). `pat`: each part sees `classes_per_partition`
    classes; a class is seen by a number of parts that grows with its rows, which are spread over these parts.

    Sizes are equal up to one row with `balance`, otherwise `min_size` plus a log-normal share of the rest. With `pat`
    this holds for each class and the parts that see it: parts are of equal size where the classes are.

    Args:
        labels: (n,), of any type that sorts.
        num_partitions: number of parts.
        scheme: `iid`, `dir` or `pat`.
        alpha: of the Dirichlet distribution; small for parts of few classes.
        classes_per_partition: of `pat`.
        balance: equal sizes.
        min_size: least rows of a part.
        seed: of all draws.

    Returns:
        one array of row numbers per part, in random order, and for `dir` the shares as drawn (num_partitions,
        classes), classes sorted; otherwise `None`.

    Raises:
        DataError: a value out of range, or parts that cannot be made of these rows.
    """
    labels = np.asarray(labels)
    _check_request(len(labels), num_partitions, scheme, alpha, min_size)
    rng = np.random.default_rng(seed)
    _, labels = np.unique(labels, return_inverse=True)
    totals = np.bincount(labels)
    shares = None
    if scheme == "pat":
        counts = _pathological_counts(totals, num_partitions, classes_per_partition, balance, min_size, rng)
        sizes = counts.sum(axis=1)
    else:
        sizes = _draw_sizes(len(labels), num_partitions, balance, min_size, rng)
    if scheme == "dir":
        shares = rng.dirichlet(np.full(len(totals), alpha), num_partitions)
        counts = _draw_counts(shares, sizes, totals, rng)

    order = rng.permutation(len(labels))
    if scheme != "iid":
        by_class = order[np.argsort(labels[order], kind="stable")]
        owners = np.empty_like(order)
        owners[by_class] = np.repeat(np.tile(np.arange(num_partitions), len(totals)), counts.T.ravel())
        order = rng.permutation(len(labels))
        order = order[np.argsort(owners[order], kind="stable")]
    return np.split(order, np.cumsum(sizes)[:-1]), shares


def _check_request(num_rows: int, num_partitions: int, scheme: str, alpha: float, min_size: int) -> None:
    if scheme not in SCHEMES:
        raise DataError(f"--scheme {scheme!r} is not one of: {', '.join(SCHEMES)}.")
    if num_partitions < 1:
        raise DataError(f"--num_partitions must be at least 1, not {num_partitions}.")
    if num_partitions > num_rows:
        raise DataError(f"--num_partitions {num_partitions} is more than the {num_rows} rows.")
    if not 0 < alpha <= _MAX_ALPHA:
        raise DataError(f"--alpha must be above 0 and at most {_MAX_ALPHA:g}, not {alpha}.")
    if min_size < 1:
        raise DataError(f"--min_size must be at least 1, not {min_size}.")
    if num_partitions * min_size > num_rows:
        raise DataError(
            f"--min_size {min_size} cannot be reached: {num_rows} rows in {num_partitions} parts are "
            f"{num_rows / num_partitions:.4g} each. Give a smaller --min_size or --num_partitions."
        )


def _draw_sizes(
    num_rows: int, num_partitions: int, balance: bool, min_size: int, rng: np.random.Generator
) -> np.ndarray:
    if balance:
        return num_rows // num_partitions + (np.arange(num_partitions) < num_rows % num_partitions)
    weights = rng.lognormal(sigma=_SIZE_SIGMA, size=num_partitions)
    return min_size + _apportion(num_rows - min_size * num_partitions, weights)


def _apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `weights` that add up to `total`, by largest remainders."""
    exact = total * weights / weights.sum()
    numbers = np.floor(exact).astype(int)
    numbers[np.argsort(numbers - exact, kind="stable")[: total - numbers.sum()]] += 1
    return numbers


def _draw_counts(shares: np.ndarray, sizes: np.ndarray, totals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of each class (parts, classes) for each part. Every round but the last exhausts a class."""
    counts = np.zeros(shares.shape, dtype=int)
    left, missing = totals.copy(), sizes.copy()
    while missing.any():
        weights = shares * (left > 0)
        weights[weights.sum(axis=1) == 0] = left
        draws = rng.multinomial(missing, weights / weights.sum(axis=1, keepdims=True))
        for label in np.flatnonzero(draws.sum(axis=0) > left):
            draws[:, label] = rng.multivariate_hypergeometric(draws[:, label], left[label])
        counts += draws
        left -= draws.sum(axis=0)
        missing -= draws.sum(axis=1)
    return counts


def _pathological_counts(
    totals: np.ndarray,
    num_partitions: int,
    classes_per_partition: int,
    balance: bool,
    min_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rows of each class (parts, classes) for each part: `classes_per_partition` entries of a row are not 0."""
    seen = _deal_classes(_parts_per_class(totals, num_partitions, classes_per_partition), num_partitions, rng)
    weights = rng.lognormal(sigma=_SIZE_SIGMA, size=num_partitions)
    counts = np.zeros(seen.shape, dtype=int)
    for label, total in enumerate(totals):
        parts = rng.permutation(np.flatnonzero(seen[:, label]))
        if balance:
            # The rows that are left over go to the parts that are smallest so far.
            parts = parts[np.argsort(counts[parts].sum(axis=1), kind="stable")]
            counts[parts, label] = total // len(parts) + (np.arange(len(parts)) < total % len(parts))
        else:
            least = min(math.ceil(min_size / classes_per_partition), total // len(parts))
            counts[parts, label] = least + _apportion(total - least * len(parts), weights[parts])
    smallest = counts.sum(axis=1).min()
    if smallest < min_size:
        raise DataError(
            f"--min_size {min_size} cannot be reached: the smallest part of {classes_per_partition} classes has "
            f"{smallest} rows. Give a smaller --min_size or --num_partitions, or other --classes_per_partition."
        )
    return counts


def _parts_per_class(totals: np.ndarray, num_partitions: int, classes_per_partition: int) -> np.ndarray:
    """How many parts see each class: where a class has most rows for each part that sees it, another part sees it."""
    if not 1 <= classes_per_partition <= len(totals):
        raise DataError(
            f"--classes_per_partition must be between 1 and the number of classes, {len(totals)}, not "
            f"{classes_per_partition}."
        )
    wanted = num_partitions * classes_per_partition
    most = np.minimum(totals, num_partitions)
    if not len(totals) <= wanted <= most.sum():
        limit = f"at least {len(totals)}" if wanted < len(totals) else f"at most {most.sum()}"
        raise DataError(
            f"--num_partitions {num_partitions} x --classes_per_partition {classes_per_partition} must be {limit} "
            f"for {len(totals)} classes of {totals.min()} to {totals.max()} rows."
        )
    parts = np.ones(len(totals), dtype=int)
    heap = [(-total, label) for label, total in enumerate(totals) if parts[label] < most[label]]
    heapq.heapify(heap)
    for _ in range(wanted - len(totals)):
        label = heapq.heappop(heap)[1]
        parts[label] += 1
        if parts[label] < most[label]:
            heapq.heappush(heap, (-totals[label] / parts[label], label))
    return parts


def _deal_classes(parts_per_class: np.ndarray, num_partitions: int, rng: np.random.Generator) -> np.ndarray:
    """Which part sees which class (parts, classes), bool; the same number of classes for each part."""
    left = parts_per_class.copy()
    each = left.sum() // num_partitions
    seen = np.zeros((num_partitions, len(left)), dtype=bool)
    for part in range(num_partitions):
        # A class that all remaining parts must see is taken; there are never more of these than `each`.
        due = left == num_partitions - part
        free = np.where(due, 0, left)
        seen[part] = due
        if due.sum() < each:
            seen[part, rng.choice(len(left), each - due.sum(), replace=False, p=free / free.sum())] = True
        left -= seen[part]
    return seen


# From a data set to files


@dataclass
class LabelledRows:
    """The train split of a data set with one class per row.

    Args:
        rows: all columns, with the data set's own features.
        label_column: where the labels are.
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
    cache_dir: str | None = None,
    token: str | None = None,
) -> LabelledRows:
    """Load the train split of a data set from one of three sources.

    Args:
        dataset_name: Hub name, folder of parquet files (also below it) or of images, or an installed sample.
        dataset_config_name: configuration of it.
        label_column_name: default: `label`, else `fine_label`.
        train_file: csv, json, jsonl or parquet.
        train_dir: images, one folder per class.
        cache_dir: where downloads are kept.
        token: for private Hub repositories.

    Raises:
        DataError: a source, split or column that is missing, or labels that are no classes.
    """
    given = {"dataset_name": dataset_name, "train_file": train_file, "train_dir": train_dir}
    given = {flag: value for flag, value in given.items() if value is not None}
    if len(given) != 1:
        raise DataError(
            "Give the rows by one of --dataset_name, --train_file and --train_dir, not by "
            f"{' and '.join(f'--{flag}' for flag in given) or 'none'}."
        )
    ((flag, name),) = given.items()
    source = f"--{flag} {name}"
    splits = _load_splits(flag, name, dataset_config_name, source, cache_dir, token)
    check_splits(splits, ["train"], _HINTS, source)
    rows = splits["train"]
    known = next((name for name in _LABEL_COLUMNS if name in rows.column_names), _LABEL_COLUMNS[0])
    column = label_column_name or known
    check_columns(rows, [column], "label_column_name", f"{source}, split 'train'")
    resolved, problem_type, names = resolve_labels({"train": rows}, column, None, source)
    if problem_type != SINGLE_LABEL:
        raise DataError(
            f"{source}: column {column!r} ({problem_type}) does not hold one class per row; name another by "
            "--label_column_name."
        )
    return LabelledRows(rows, column, np.asarray(resolved["train"][column][:]), names)


_HINTS = {"train": "the parts are cut from it; give other data"}


def _load_splits(
    flag: str, name: str, config: str | None, source: str, cache_dir: str | None, token: str | None
) -> dict:
    if flag != "dataset_name":
        if not (os.path.isfile if flag == "train_file" else os.path.isdir)(name):
            raise DataError(f"{source} is not there.")
        if flag == "train_dir":
            return load_image_folder(name, source, cache_dir)
        if Path(name).suffix not in FILE_FORMATS:
            raise DataError(f"{source} must end in one of: {', '.join(sorted(FILE_FORMATS))}.")
        return load_files({"train": [name]}, source, cache_dir)
    if not os.path.isdir(name):
        from .cifar import HUB_NAMES

        if name in _SAMPLES:
            return _SAMPLES[name]()
        return load_hub(HUB_NAMES.get(name, name), config, source, cache_dir, token)
    folder = Path(name)
    if config is None and any(folder.iterdir()) and not any(folder.rglob("*.parquet")):
        return load_image_folder(name, source, cache_dir)
    files = _parquet_files_below(folder, config, source)
    check_splits(files, ["train"], _HINTS, source)
    return load_files({"train": files["train"]}, source, cache_dir)


def _parquet_files_below(folder: Path, config: str | None, source: str) -> dict[str, list[str]]:
    try:
        return parquet_files(folder, config, source)
    except DataError:
        folders = sorted({path.parent for path in folder.rglob("*.parquet")})
        if not folders or config is not None:
            raise
    if len(folders) > 1:
        raise DataError(f"{source} holds several data sets ({', '.join(map(str, folders))}): give one of them.")
    return parquet_files(folders[0], None, source)


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
    """Write `train/<part>` and `valid/<part>` files, partition.json and partition.png; all of them or nothing.

    The first rows of a part, `valid_fraction` of them rounded down, are its validation rows. partition.json, without
    which nothing is loaded, is written last; what a killed process left is removed by the next one.

    Args:
        data: what the row numbers point into.
        parts: row numbers in random order, from `partition_indices`.
        output_dir: a folder that is empty or not there.
        format: `parquet` with all columns, images as the encoded bytes they are, or `npz` with `x` and `y`.
        valid_fraction: at least 0, below 1; with 0 there are no `valid` files.
        input_column_names: of npz: one image column, one text column or two. Default: the only ones there are.
        shares: Dirichlet shares (parts, classes that occur).
        settings: what else partition.json says.

    Returns:
        what partition.json says.

    Raises:
        DataError: a folder that is not empty, or rows that npz cannot hold.
    """
    output_dir = Path(output_dir)
    check_output_dir(output_dir)
    if format not in FORMATS:
        raise DataError(f"--format {format!r} is not one of: {', '.join(FORMATS)}.")
    if not 0 <= valid_fraction < 1:
        raise DataError(f"--valid_fraction must be at least 0 and below 1, not {valid_fraction}.")
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
            folder = output_dir / _FOLDERS[split]
            folder.mkdir()
            for part, numbers in enumerate(indices):
                write(rows, numbers, folder / f"{part}.{format}")
            about["sha256"][split] = [_sha256(folder / f"{part}.{format}") for part in range(len(indices))]
        plot_partition(counts, data.label_names, output_dir / _PLOT_FILE)
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        (output_dir / PARTITION_FILE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return about


def check_output_dir(folder: str | os.PathLike) -> None:
    """Raise DataError where files would be overwritten. What a killed process left may be."""
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"--output_dir {folder} is a link to nothing: make the folder that it names, or give another.")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output_dir {folder} is not an empty folder but a file: give another.")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found - (_FILES if _MARK in found else set()):
        raise DataError(f"--output_dir {folder} is there and not an empty folder: give another, or remove it.")


@contextmanager
def _unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder as unfinished while it is written; after an error it is as it was before.

    Raises:
        DataError: another process is writing there.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _MARK, "w") as mark:
        try:
            if fcntl is not None:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process holds none
        except OSError as error:
            raise DataError(f"--output_dir {folder}: another process writes a partition there.") from error
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
    texts = [name for name, feature in features.items() if name != data.label_column and _is_text(feature)]
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


def _is_text(feature) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


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


def plot_partition(label_counts: np.ndarray, label_names: Sequence[str], path: str | os.PathLike):
    """Draw the labels of each part as a picture, one column per part, above it the sizes; returns the figure.

    Args:
        label_counts: (parts, classes).
        label_names: by class.
        path: of the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..evaluation.plots import literal

    sizes = label_counts.sum(axis=1)
    num_parts, num_classes = label_counts.shape
    # At least two pixels per part and class at 150 dpi, within the size of a page or a wide screen.
    width, height = np.clip([num_parts / 75 + 2, num_classes / 75 + 3], (8, 5), (24, 18))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    above.stairs(sizes, np.arange(num_parts + 1) - 0.5, fill=True, color="#2f5d9b")
    above.set_ylabel("rows")
    above.spines[["top", "right"]].set_visible(False)
    above.set_title(
        f"{sizes.sum()} rows of {num_classes} classes in {num_parts} parts of {sizes.min()} to {sizes.max()}"
    )
    shares = label_counts.T / sizes
    shown = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0)
    axes.set_xlabel("part")
    axes.set_ylabel("class")
    if num_classes <= 30:
        axes.set_yticks(range(num_classes), [literal(str(name)[:24]) for name in label_names])
    figure.colorbar(shown, ax=axes, label="share of the part's rows", pad=0.01)
    figure.savefig(path, format="png")
    return figure


# From files to a data set


def load_partition(folder: str | os.PathLike, partition_id: int | str) -> datasets.DatasetDict:
    """Load one part, or the union of all, as the splits `train` and `validation`.

    Features are the data set's own; of npz files the input columns and the label alone. Parts that were cut with
    `--valid_fraction 0` have no `validation`.

    Args:
        folder: what `een-hf partition` wrote.
        partition_id: number of a part, or `all`.

    Raises:
        DataError: a folder that holds no partition, a part that is not there, or a file that cannot be read or is
            not what partition.json says.
    """
    folder = Path(folder)
    about, features = _read_partition_file(folder)
    parts = _part_numbers(partition_id, about["num_partitions"])
    read = _read_npz if about["format"] == "npz" else _read_parquet
    splits = {}
    for split, sizes in about["sizes"].items():
        tables = []
        for part in parts:
            path = folder / _FOLDERS[split] / f"{part}.{about['format']}"
            try:
                if about.get("sha256") and _sha256(path) != about["sha256"][split][part]:
                    raise DataError(f"it is not the file that {PARTITION_FILE} was written for.")
                table = read(path, about, features)
                if not table.schema.equals(features.arrow_schema):
                    table = table.cast(features.arrow_schema)
            except Exception as error:  # a damaged file raises nearly anything
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
    """The label names of all parts in the order of their ids; `None` if the partition was not cut by this column.

    A part may lack rows of some classes: only so do the models of all parts have the same labels.
    """
    about, _ = _read_partition_file(Path(folder))
    return tuple(about["label_names"]) if about["label_column"] == column else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_partition_file(folder: Path) -> tuple[dict, datasets.Features]:
    """What partition.json says, checked, and the features of the rows."""
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
        and {"train"} <= sizes.keys() <= _FOLDERS.keys()
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
