"""What a command answers bad input and a full disk with."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .models import ExitConfigurationError


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of writers that are not Python's: safetensors, and torch.save, whose last error is about the position in the file.
_FULL_WORDS = (
    *(f"os error {number}" for number in _FULL),
    "PytorchStreamWriter failed writing",
    "iostream error",
    "unexpected pos",
)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether something could not be written for want of room, by the error or by one that it followed."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def in_one_line(error: Exception) -> str:
    """An error of a library as the end of a message: its kind and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text[:200]}' if text else ''}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line, instead of a traceback, on bad input and on a full disk."""
    try:
        yield
    except ExitConfigurationError as error:
        message = str(error)
        if message.startswith("Caught "):  # by a worker of a data loader, with its traceback
            message = message.rstrip().rsplit("\n", 1)[-1].split(": ", 1)[-1]
        sys.exit(f"error: {message}")
    except Exception as error:
        if not is_full_disk(error):
            raise
        sys.exit(
            f"error: a file could not be written ({error}): make room where the output goes, then give the same "
            "command again. What was written whole before is kept."
        )
