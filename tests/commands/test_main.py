"""The list of commands."""

import re
from pathlib import Path

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


def test_version_is_the_newest_of_the_changelog(capsys):
    """What breaks: a bug report cannot name its version, or a release has no entry in CHANGELOG.md."""
    newest = re.search(r"^## (\S+)", (Path(__file__).parents[2] / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"een_hf {newest}\n")
