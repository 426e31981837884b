"""What a command answers bad input with."""

import pytest
from torch.utils.data import DataLoader

from een_hf.data.task import DataError
from een_hf.errors import one_line_errors


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
