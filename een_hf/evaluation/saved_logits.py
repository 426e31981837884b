"""The file `exit_logits.npz`: the logits of every exit on the evaluation rows of a run."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import in_one_line
from ..files import replacing
from ..models import ExitConfigurationError


LOGITS_NAME = "exit_logits.npz"


def save_exit_logits(
    output_dir: str | os.PathLike,
    logits: np.ndarray,
    labels: np.ndarray,
    row_ids: Sequence,
    part: str | Sequence[str],
) -> Path:
    """Write `exit_logits.npz`, completely or not at all.

    Args:
        output_dir: an existing folder.
        logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,) or (num_rows, num_labels).
        row_ids: (num_rows,), numbers or text.
        part: the use of each row, such as `calibration` or `report`, (num_rows,), or one text for all.

    Returns:
        path of the file.

    Raises:
        ExitConfigurationError: the numbers of rows differ.
    """
    logits = np.asarray(logits)
    arrays = {"logits": logits, "labels": np.asarray(labels), "row_ids": np.asarray(row_ids)}
    arrays["part"] = np.full(len(logits), part) if isinstance(part, str) else np.asarray(part)
    for name, array in arrays.items():
        if len(array) != len(logits):
            raise ExitConfigurationError(f"{name} has {len(array)} rows, but logits have {len(logits)}.")
        if array.dtype == object:
            arrays[name] = array.astype(str)
    path, content = Path(output_dir) / LOGITS_NAME, io.BytesIO()
    np.savez_compressed(content, **arrays)  # in memory: on a full disk, closing the archive would raise once more
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return path


def load_exit_logits(output_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read `exit_logits.npz`.

    Args:
        output_dir: the output folder of a run.

    Returns:
        `logits`, `labels`, `row_ids` and `part`, as in `save_exit_logits`.

    Raises:
        ExitConfigurationError: the file does not exist, is damaged, or has another content.
    """
    path = Path(output_dir) / LOGITS_NAME
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        wrong = _wrong_array(arrays)
    except Exception as error:  # a damaged archive raises errors of many kinds: zlib.error, EOFError, MemoryError, ...
        wrong = in_one_line(error)
    if wrong:
        raise ExitConfigurationError(f"{path} cannot be read: {wrong}")
    return arrays


def _wrong_array(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the content of `exit_logits.npz`."""
    kinds = {"logits": "f", "labels": "iufb", "row_ids": "iuU", "part": "U"}
    for name, kind in kinds.items():
        if name not in arrays:
            return f"it has no array {name!r}."
        if arrays[name].dtype.kind not in kind:
            return f"{name} are of type {arrays[name].dtype}."
    logits = arrays["logits"]
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        return f"logits have shape {logits.shape}, not (rows, exits, labels)."
    for name, dimensions in (("labels", (1, 2)), ("row_ids", (1,)), ("part", (1,))):
        if arrays[name].ndim not in dimensions or len(arrays[name]) != len(logits):
            return f"{name} have shape {arrays[name].shape}, logits {logits.shape}."
    return None
