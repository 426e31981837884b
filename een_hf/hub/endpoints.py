"""The file by which Inference Endpoints run a model."""

import os
import shutil
from pathlib import Path


def write_handler(folder: str | os.PathLike) -> Path:
    """Put `handler.py`, which Inference Endpoints call, beside a saved model, and return where."""
    return Path(shutil.copy(Path(__file__).parents[1] / "serving" / "handler.py", Path(folder) / "handler.py"))
