"""What a command answers bad input and a full disk with."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .models import ExitConfigurationError


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of writers that are not Python's: safetensors, torch.save.
_FULL_WORDS = (*(f"os error {number}" for number in _FULL), "PytorchStreamWriter failed writing")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line, instead of a traceback, on bad input and on a full disk."""
    try:
        yield
    except ExitConfigurationError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        full = getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)
        if not full:
            raise
        sys.exit(
            f"error: a file could not be written ({error}): make room where the output goes, then give the same "
            "command again. What was written whole before is kept and gone on from."
        )
