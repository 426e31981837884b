"""Writing of files, completely or not at all, and by one process at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import DiskFullError, is_full_disk


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


@contextmanager
def locked(path: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes out of a file or folder; the lock of a process that was killed is released.

    Args:
        path: it must exist. Where its file system has no locks, nothing is kept out.
        busy: the error if another process is inside.
    """
    if fcntl is None:
        yield
        return
    held = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks no file that is opened to read
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)
