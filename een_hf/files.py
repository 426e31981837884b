"""Writing of files, completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import DiskFullError, is_full_disk


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path, remedy: str) -> Iterator[None]:
    """Name a file in the error if the disk is full while it is written.

    Args:
        path: the file.
        remedy: the end of the message, after the name and the cause.

    Raises:
        DiskFullError: the disk is full. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        raise DiskFullError(f"{path} could not be written ({error}): {remedy}") from error
