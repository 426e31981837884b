"""What a command answers bad input with."""

import errno
import resource
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from een_hf import ExitConfigurationError, ExitError
from een_hf.data.task import DataError
from een_hf.errors import (
    CheckpointError,
    DiskFullError,
    ExportError,
    NonFiniteLossError,
    check_seed,
    is_full_disk,
    one_line_errors,
)


class Broken:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise DataError(f"images/{index}.png: it is corrupt.")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_input_is_told_in_one_line_wherever_it_is_read(workers):
    """A worker's traceback around the message would hide the file that it names."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        list(DataLoader(Broken(), num_workers=workers))
    assert str(end.value) == "error: images/0.png: it is corrupt."


def test_where_access_is_denied_the_path_is_told_in_one_line(tmp_path):
    with (
        pytest.raises(SystemExit, match=f"^error: a file cannot be read or written .*{tmp_path}.*$"),
        one_line_errors(),
    ):
        tmp_path.read_text()
    with pytest.raises(SystemExit, match="^error: .*Permission denied: 'rows.csv'.*$"), one_line_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "rows.csv")


def test_a_full_disk_is_recognised_inside_torch_save(tmp_path):
    """What breaks: a run of days ends in "unexpected pos 704 vs 598" and deletes nothing that is half-written."""
    with pytest.raises(RuntimeError) as no_space:
        torch.save({"weights": torch.zeros(100_000)}, "/dev/full")
    assert is_full_disk(no_space.value)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(RuntimeError) as too_large:
            torch.save({"weights": torch.zeros(100_000)}, tmp_path / "model.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_full_disk(too_large.value)


def test_a_full_disk_is_recognised_behind_another_error():
    def write(error):
        try:
            raise error
        except OSError:
            raise RuntimeError("the file could not be closed")  # noqa: B904

    for number, wanted in ((errno.ENOSPC, True), (errno.EACCES, False)):
        with pytest.raises(RuntimeError) as found:
            write(OSError(number, "message"))
        assert is_full_disk(found.value) is wanted
    with pytest.raises(SystemExit, match="a file could not be written"), one_line_errors():
        write(OSError(errno.ENOSPC, "message"))


@pytest.mark.parametrize(
    ("error", "about_settings", "builtin"),
    [
        (ExitConfigurationError, True, ValueError),
        (DataError, True, ValueError),
        (CheckpointError, True, ValueError),
        (DiskFullError, False, OSError),
        (NonFiniteLossError, False, ArithmeticError),
        (ExportError, False, RuntimeError),
    ],
)
def test_errors_say_what_they_are_about(error, about_settings, builtin):
    """What breaks: a caller who corrects settings on ExitConfigurationError repeats a run on a full disk for ever."""
    assert issubclass(error, ExitError) and issubclass(error, builtin)
    assert issubclass(error, ExitConfigurationError) == about_settings
    with pytest.raises(SystemExit, match="^error: the message$"), one_line_errors():
        raise error("the message")


@pytest.mark.parametrize(("seed", "bits"), [(-1, 64), (2**32, 32), (2**64, 64), (1.5, 64), ("1", 64)])
def test_seeds_that_no_generator_takes_are_refused(seed, bits):
    """What breaks: a run ends in an error of NumPy after its training."""
    with pytest.raises(ExitConfigurationError, match="--seed must be a whole number"):
        check_seed(seed, bits=bits)


@pytest.mark.parametrize(("seed", "bits"), [(None, 32), (0, 32), (2**32 - 1, 32), (np.int64(7), 32), (2**40, 64)])
def test_seeds_that_all_generators_of_their_size_take_are_taken(seed, bits):
    check_seed(seed, bits=bits)
    if seed is not None:
        np.random.default_rng(seed)
        torch.Generator().manual_seed(int(seed))
        if bits == 32:
            np.random.RandomState(seed)


def test_no_token_is_printed():
    """What breaks: an address with a token, given where none fits, ends in the log of a cluster."""
    token = "hf_" + "aB3" * 11
    addresses = [
        f"https://user:{token}@host/x",
        f"https://user:pass@word@host/{token}",
        f"https://host/x?token={token}",
    ]
    for text in (*addresses, f"--token {token}"):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise ExitConfigurationError(f"The model {text} cannot be loaded from hf_models/x.")
        assert token not in str(ended.value) and "word" not in str(ended.value)
        assert "***" in str(ended.value) and "hf_models/x" in str(ended.value)
