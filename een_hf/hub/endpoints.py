"""The handler by which Inference Endpoints run a model."""

import os
import shutil
from pathlib import Path


def write_handler(folder: str | os.PathLike) -> Path:
    """Write `handler.py`, which Inference Endpoints call, into the folder of a saved model.

    Args:
        folder: folder of the model.

    Returns:
        path of the file.
    """
    return Path(shutil.copy(Path(__file__).parents[1] / "serving" / "handler.py", Path(folder) / "handler.py"))
