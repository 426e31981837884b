"""Features: the inputs of the exits' heads and the model's answers for every row, stored in chunks on disk."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..errors import make_folder
from ..files import replacing, room_for
from ..models import EarlyExitMixin, ExitConfigurationError, ExitHead
from ..training.frozen_heads import new_features, read_features
from .arguments import FEATURES_FOLDER
from .rows import RetrofitRows


ROOM = "free space on the disk of --output_dir, then repeat the command. It continues from the features on disk."


def compute_features(
    model: EarlyExitMixin,
    rows: RetrofitRows,
    output_dir: Path,
    *,
    batch_size: int = 32,
    chunk_size: int = 512,
    feature_dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the inputs of the exits' heads for every row, and the model's answers.

    Chunks of the same model and rows that are already on disk are not computed again.

    Args:
        model: an early-exit model in eval mode.
        rows: the rows.
        output_dir: the chunks are stored in a folder below it.
        batch_size: rows per pass of the model.
        chunk_size: rows per file.
        feature_dtype: precision of the features, `float32` or `float16`.

    Returns:
        features (num_rows, num_exits - 1, width) in `feature_dtype`, and the last exit's logits (num_rows,
        num_labels), float32.

    Raises:
        ExitConfigurationError: a full disk, or answers or features that are not finite.
    """
    folder = output_dir / FEATURES_FOLDER / _fingerprint(model, rows, chunk_size, feature_dtype)
    make_folder("output_dir", folder)
    features, logits = None, np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    with tqdm(total=len(rows), unit="row", desc="Reading rows") as bar:
        for number, start in enumerate(range(0, len(rows), chunk_size)):
            chunk = range(start, min(start + chunk_size, len(rows)))
            path = folder / f"chunk-{number:05d}.npz"
            width = features.shape[2] if number else None
            found = _read_chunk(
                path, (len(chunk), model.num_exits - 1, width), feature_dtype, logits[: len(chunk)].shape
            )
            if found is None:
                found = _compute_chunk(model, rows, chunk, batch_size, feature_dtype)
                _check_finite(*found, start, model.config.name_or_path)
                content = io.BytesIO()  # in memory: on a full disk, closing the archive would raise once more
                np.savez(content, features=found[0], logits=found[1])
                with room_for(path, ROOM), replacing(path) as temporary, temporary.open("wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
            if not number:
                remedy = "give fewer rows, --feature_dtype float16, or another --exit_head"
                features = new_features((len(rows), *found[0].shape[1:]), feature_dtype, remedy)
            features[start : chunk.stop], logits[start : chunk.stop] = found
            bar.update(len(chunk))
    return features, logits


def _fingerprint(model: EarlyExitMixin, rows: RetrofitRows, chunk_size: int, feature_dtype: str) -> str:
    """A name for these features, which changes with the model, the rows and the settings."""
    config, digest = model.config, hashlib.sha256()
    settings = [config.exit_layers, config.exit_pooling, config.last_exit_pooling, str(model.dtype)]
    if type(model.exit_head_modules(0)[0]).pool is not ExitHead.pool:
        settings.append(config.exit_head)
    settings += [chunk_size, feature_dtype, len(rows)]
    digest.update(json.dumps(settings).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("exit_heads."):
            digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for part in rows.fingerprint():
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _check_finite(features: np.ndarray, logits: np.ndarray, start: int, name: str) -> None:
    """Raise an error for answers that exits cannot learn, and features that the precision on disk cannot store."""
    for values, cause in (
        (logits, f"MODEL {name} answers with NaN or infinity, because of its weights or their precision, for"),
        (features, f"--feature_dtype {features.dtype} cannot store the features: give float32. The first is"),
    ):
        broken = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
        if len(broken):
            raise ExitConfigurationError(f"{cause} row {start + broken[0]} (counted from 0).")


def _read_chunk(path: Path, shape: tuple, dtype: str, logits_shape: tuple) -> list[np.ndarray] | None:
    """Features and logits of a chunk; `None` if its file is missing, or its arrays do not fit or are not finite.

    What heads read is of any width (`None`) in the first chunk, and of the same in the others.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            features, logits = file["features"], file["logits"]
    except Exception:  # a damaged archive raises errors of many kinds
        return None
    fit = features.ndim == 3 and features.shape == (*shape[:2], shape[2] or features.shape[2])
    fit &= (features.dtype, logits.shape, logits.dtype) == (dtype, logits_shape, np.float32)
    return [features, logits] if fit and all(np.isfinite(values).all() for values in (features, logits)) else None


def _compute_chunk(
    model: EarlyExitMixin, rows: RetrofitRows, chunk: range, batch_size: int, feature_dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features (rows, num_exits - 1, width) and logits (rows, num_labels) of some rows."""
    order, features, logits = rows.by_length(chunk), [], []
    for start in range(0, len(order), batch_size):
        read, answers = read_features(model, rows.batch(model, order[start : start + batch_size]))
        features.append(read.cpu())
        logits.append(answers.cpu())
    back = np.argsort(order)
    return torch.cat(features).to(getattr(torch, feature_dtype)).numpy()[back], torch.cat(logits).numpy()[back]
