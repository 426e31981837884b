"""The commands of `een-hf`, one per file.

A command's file has a docstring, which `--help` shows, `add_arguments(parser)` and `run(args)`.
"""

import argparse
import importlib
import sys

from .. import __version__
from ..errors import one_line_errors, refuse_nan
from ..extras import named_extras


COMMANDS = {
    "train": "fine-tune a model with exits, evaluate and calibrate them",
    "partition": "divide a labelled data set into IID or non-IID parts",
    "retrofit": "make a fine-tuned classifier cheaper, without labels",
    "calibrate": "choose an exit policy from the saved logits of a run",
    "compare": "compare runs in one table and one plot",
    "serve": "answer requests over HTTP",
    "export": "write an ONNX graph that skips the layers after the exit",
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Writes values as the help of a training run does: N for whole numbers, X for numbers."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, "NAME")


def main(argv: list[str] | None = None) -> None:
    """Entry point of `een-hf` and `python -m een_hf`."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "een-hf",
        usage="een-hf COMMAND ...",
        description=f"commands:\n{listing}\n\neen-hf COMMAND --help describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"een_hf {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        sys.exit(2)
    name = parser.parse_args(argv[:1]).command
    with one_line_errors(), named_extras():
        command = importlib.import_module(f"{__name__}.{name}")
    parser = argparse.ArgumentParser(f"een-hf {name}", description=command.__doc__, formatter_class=_HelpFormatter)
    command.add_arguments(parser)
    with one_line_errors():
        args = parser.parse_args(argv[1:])
        refuse_nan(vars(args))
        command.run(args)
