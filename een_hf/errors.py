"""The errors of this library, and their conversion to one line in commands.

`ExitError` is the base class. `ExitConfigurationError` is about settings and inputs; `DataError`,
`MissingPackageError` and `CheckpointError` are its subclasses. The others are about events during a run.
"""

import errno
import math
import numbers
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .models import ExitConfigurationError, ExitError


# Tokens of the Hub, and user and password of an address: a message may end in a log that others read.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=://)[^/\s]+(?=@)|(?<=[?&]token=)[^&\s]+")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of writers that do not raise Python's OSError: safetensors and torch.save.
_FULL_MESSAGES = (
    *(f"os error {number}" for number in _FULL),
    "PytorchStreamWriter failed writing",
    "iostream error",
    "unexpected pos",
)


class CheckpointError(ExitConfigurationError):
    """The checkpoint to resume from is missing, damaged, or of another scheme."""


class DiskFullError(ExitError, OSError):
    """A file could not be written because the disk, or the quota, is full."""


class NonFiniteLossError(ExitError, ArithmeticError):
    """The training loss is NaN or infinite."""


class ExportError(ExitError, RuntimeError):
    """The answers of an exported graph differ from those of the model."""


def refuse_nan(flags: Mapping[str, object]) -> None:
    """Raise an error for NaN, for which every comparison is false.

    Args:
        flags: values by the names of their flags; only numbers and lists of numbers are checked.

    Raises:
        ExitConfigurationError: names the flag.
    """
    for name, value in flags.items():
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and math.isnan(number):
                raise ExitConfigurationError(f"--{name} must be a number, not {number}.")


def check_seed(seed: int | None, name: str = "seed", bits: int = 32) -> None:
    """Raise an error for a seed that the random generators do not take.

    Args:
        seed: the value; `None`: not given.
        name: of its flag.
        bits: size of the largest seed; those that all generators share have 32.

    Raises:
        ExitConfigurationError: it is not a whole number of so many bits.
    """
    if seed is not None and not (isinstance(seed, numbers.Integral) and 0 <= seed < 2**bits):
        raise ExitConfigurationError(f"--{name} must be a whole number, at least 0 and below 2**{bits}, not {seed!r}.")


def make_folder(flag: str, folder: str | os.PathLike) -> None:
    """Create an output folder.

    Args:
        flag: the flag that names it.
        folder: the folder, which may exist.

    Raises:
        ExitConfigurationError: it, or a parent of it, is a file, or it cannot be created.
    """
    folder = Path(folder)
    present = next(filter(os.path.lexists, (folder, *folder.parents)), None)
    if present is not None and not present.is_dir():
        raise ExitConfigurationError(f"--{flag} {folder}: {present} is no folder; give another.")
    with refused(f"--{flag} {folder} cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, is that the disk is full."""
    return any(
        getattr(one, "errno", None) in _FULL or any(message in str(one) for message in _FULL_MESSAGES)
        for one in chain_of(error)
    )


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the latest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def in_one_line(error: Exception) -> str:
    """An error of a library in one line: its type and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text[:200]}' if text else ''}"


@contextmanager
def refused(flags: str) -> Iterator[None]:
    """Convert the errors of a library for settings that it does not accept.

    Args:
        flags: the flags that set them, and their values.

    Raises:
        ExitConfigurationError: with the library's own message.
    """
    try:
        yield
    except ExitConfigurationError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise ExitConfigurationError(f"{flags}: {in_one_line(error)}") from error


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Convert the errors of a library for the files of a model.

    Args:
        what: the flag or argument that names the model, and its value.

    Raises:
        ExitConfigurationError: a file is missing, damaged, or does not fit the others.
    """
    try:
        yield
    except ExitConfigurationError as error:  # it may not say of which model
        raise ExitConfigurationError(f"{what} cannot be loaded: {error}") from error
    except Exception as error:
        shapes = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        cause = "weights have other shapes than its config.json says" if shapes else in_one_line(error)
        raise ExitConfigurationError(f"{what} cannot be loaded: {cause}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line, not a traceback, after bad input, on a full disk, or where access is denied."""
    try:
        yield
    except ExitError as error:
        message = str(error)
        if message.startswith("Caught "):  # by a worker of a data loader, with its traceback
            message = message.rstrip().rsplit("\n", 1)[-1].split(": ", 1)[-1]
        sys.exit(f"error: {_SECRET.sub('***', message)}")
    except (PermissionError, IsADirectoryError) as error:
        sys.exit(f"error: a file cannot be read or written ({in_one_line(error)}).")
    except Exception as error:
        if not is_full_disk(error):
            raise
        sys.exit(
            f"error: a file could not be written ({error}): free space on the disk of the output, then repeat the "
            "command. Files that were complete are kept."
        )
