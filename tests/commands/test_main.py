"""The list of commands."""

import pytest

from een_hf.commands import COMMANDS, main


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0)])
def test_lists_every_command(argv, status, capsys):
    """What breaks: `een-hf` alone says that an argument is missing, and not which there are."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    printed = capsys.readouterr().out
    assert end.value.code == status
    assert all(f"  {name} " in printed and purpose in printed for name, purpose in COMMANDS.items())
