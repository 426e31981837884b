"""Records of runs: which rows a model was trained on, and whether calibration rows may certify a risk."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import make_folder
from ..files import locked
from ..models import ExitConfigurationError


RUN_FILE = "_run_arguments.json"  # contains local paths; files that begin with an underscore are never pushed
# Flags that determine which training rows --calibration_samples or --train_val_split hold out.
_HELD_OUT_BY = (
    "calibration_samples seed dataset_name dataset_config_name task_name train_file train_dir train_val_split "
    "max_train_samples partition_dir partition_id"
).split()
_UNKNOWN = "the weights, for all that is known"


@contextmanager
def only_run_in(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of an output folder during this run.

    Raises:
        ExitConfigurationError: another run is writing there, or it is not a folder.
    """
    folder = Path(folder)
    new = not os.path.exists(folder)
    make_folder("output_dir", folder)
    busy = f"--output_dir {folder}: another run is writing there. Give another --output_dir, or wait for it."
    try:
        with locked(folder, ExitConfigurationError(busy)):
            yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def read_run(folder: str | os.PathLike) -> dict | None:
    """The record of the run in a folder, or of the run that a checkpoint belongs to; `None` without a record.

    Raises:
        ExitConfigurationError: a record that is damaged; its file is named.
    """
    if not os.path.isdir(folder):
        return None  # a name of the Hub
    paths = (Path(place, RUN_FILE) for place in (folder, Path(folder).parent))
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(record["settings"], dict) and all(
            isinstance(run, dict | None) for run in record.get("history", [])
        )
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ExitConfigurationError(
            f"{path} cannot be read as the record of a run. Remove the file if the model may count as one of unknown "
            "origin."
        )
    return record


def write_run(folder: str | os.PathLike, settings: dict, *, trained: bool, finished: bool, history: list) -> None:
    """Record a run: its flags, whether it trained, and the runs behind the model that it began from (`history_of`)."""
    record = {"finished": finished, "trained": trained, "settings": settings, "history": history}
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = Path(folder, f"{RUN_FILE}.part")
    written.write_text(json.dumps(record, indent=2, default=str))
    written.replace(Path(folder, RUN_FILE))


def history_of(source: str | None, has_head: bool) -> list[dict | None]:
    """The flags of the runs that trained a checkpoint, the earliest first.

    Args:
        source: the checkpoint; `None`: a model from scratch.
        has_head: whether it has its last head; a checkpoint without was not trained for a task yet.

    Returns:
        a list of flags, in which `None` stands for training that is not recorded.
    """
    record = None if source is None else read_run(source)
    if record is None:
        return [None] if has_head else []
    return [*record.get("history", []), *([record["settings"]] if record.get("trained", True) else [])]


def rows_chose(now: dict, history: list[dict | None], *, trains: bool, new_head: bool) -> str | None:
    """What else the calibration rows were used for, in this run or before. If anything, they cannot certify a risk.

    Args:
        now: the run's flags.
        history: as `history_of` returns it.
        trains: whether the run trains.
        new_head: whether the last head was new when the run began.

    Returns:
        the use, as the object of "chose"; `None`: they were used for nothing else.
    """
    earlier = [run for run in history if run is not None]
    runs = [*earlier, now] if trains else earlier
    file, count = now.get("calibration_file"), now.get("calibration_samples")
    validation = now.get("validation_file") or now.get("validation_dir")
    rows = file or (validation if count is None else None)
    if rows is not None and any(_split_with(rows, run) == "train" for run in runs):
        return "the weights"
    cut = count is not None or (validation is None and now.get("train_val_split") is not None)
    if file is None and cut and not new_head:
        # Rows of the training split: all earlier runs must have held out the same rows.
        agree = all(run.get(name) == now.get(name) for run in earlier for name in _HELD_OUT_BY)
        if None in history or not earlier or not agree:
            return _UNKNOWN
    if count is None:
        chose = [run for run in runs if run.get("load_best_model_at_end")]
        if any(file is None or _split_with(file, run) == "validation" for run in chose):
            return "the checkpoint"
    return None


def trained_on(path: str, history: list[dict | None]) -> bool:
    """Whether one of these runs read its training rows from this file or folder, from inside it or from a parent."""
    return any(_split_with(path, run) == "train" for run in history if run is not None)


def _split_with(path: str, run: dict) -> str | None:
    """The split, "train" or "validation", that a run read from there."""
    for split in ("train", "validation"):
        for kind in ("file", "dir"):
            given = run.get(f"{split}_{kind}")
            if isinstance(given, str) and _overlap(path, given):
                return split
    for name in ("dataset_name", "partition_dir"):
        folder = run.get(name)
        if isinstance(folder, str) and os.path.isdir(folder) and _overlap(path, folder):
            name = Path(path).stem.split("-")[0]
            return name if name in ("validation", "test") else "train"
    return None


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one contains the other."""
    one, other = Path(one).resolve(), Path(other).resolve()
    return one == other or one in other.parents or other in one.parents
