"""Checks that a checkpoint is complete: a run must not resume from one that was only partly written or copied."""

import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import sort_checkpoints

from ..errors import CheckpointError, in_one_line
from ..models import ExitError
from ..models.criteria import is_number


logger = logging.getLogger(__name__)

CHECKSUM_FILE = "checksums.json"
_OPTIONAL = ("train_batch_size", "best_metric", "best_global_step")
_WHOLE = ("global_step", "max_steps", "num_train_epochs")


class PublicTrainerState(TrainerState):
    """A state whose file, which is pushed with a checkpoint, contains no path of this machine.

    `best_model_checkpoint` is omitted, since it follows from `best_global_step`.
    """

    def save_to_json(self, json_path: str) -> None:
        path, self.best_model_checkpoint = self.best_model_checkpoint, None
        try:
            super().save_to_json(json_path)
        finally:
            self.best_model_checkpoint = path


def write_checksums(folder: str | os.PathLike) -> None:
    """Record the checksums of all files of a checkpoint, before the trainer's state is written, which comes last."""
    sums = {
        str(path.relative_to(folder)): _checksum(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }
    Path(folder, CHECKSUM_FILE).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def checkpoint_fault(folder: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, or `None`, by the trainer's state and the checksum of every file.

    Of a checkpoint without checksums, by an earlier version or of weights only, the state is checked.
    """
    folder = Path(folder)
    fault = _state_fault(folder / TRAINER_STATE_NAME)
    path = folder / CHECKSUM_FILE
    if fault or not path.is_file():
        return fault
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        for name, wanted in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _checksum(folder / name) != wanted:
                return f"{name} is damaged"
    except (AttributeError, OSError, RecursionError, ValueError) as error:
        return f"{CHECKSUM_FILE} cannot be read: {in_one_line(error)}"
    return None


def is_whole_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint was written completely and has not changed since."""
    return checkpoint_fault(folder) is None


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint with the most steps, or `None`; a warning names those that are skipped, and why."""
    checkpoints = sort_checkpoints(output_dir) if os.path.isdir(output_dir) else []
    for folder in reversed(checkpoints):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        logger.warning("%s is skipped: %s.", folder, fault)
    return None


@contextmanager
def reading_checkpoint(folder: str | os.PathLike | None) -> Iterator[None]:
    """Convert any error of a library for a damaged checkpoint into one line that names the checkpoint."""
    try:
        yield
    except ExitError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder} cannot be read: {in_one_line(error)}. Give an earlier checkpoint, or "
            "start again from its weights with --model_name_or_path."
        ) from error


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _state_fault(path: Path) -> str | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return f"it has no {TRAINER_STATE_NAME}"
    except (ValueError, RecursionError):
        return f"{TRAINER_STATE_NAME} is incomplete"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{TRAINER_STATE_NAME} contains no state"
    known = {field.name: field.default for field in fields(TrainerState)}
    wrong = [name for name, value in state.items() if name not in known or not _fits(name, value, known[name])]
    return f"{TRAINER_STATE_NAME} has a wrong {wrong[0]}" if wrong else None


def _fits(name: str, value, default) -> bool:
    """Whether a value of the state is of the kind of its field."""
    if name == "log_history":
        return isinstance(value, list) and all(
            isinstance(logs, dict) and is_number(logs.get("step")) for logs in value
        )
    if name == "stateful_callbacks":
        return isinstance(value, dict) and all(isinstance(state, dict | list) for state in value.values())
    if name in _OPTIONAL:
        return value is None or is_number(value) or isinstance(value, float) and math.isnan(value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return is_number(value) and 0 <= value <= sys.maxsize and (name not in _WHOLE or isinstance(value, int))
    return value is None or isinstance(value, dict if name == "trial_params" else str)
