"""Flags that commands share with training runs; they are declared once, in the dataclasses of the runs."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin


def add_flags(parser: ArgumentParser, arguments_class: type, names: Sequence[str], **defaults: Any) -> None:
    """Add flags of a run to a command, with their types, choices, help and defaults.

    Args:
        parser: the parser of the command, or a group of it.
        arguments_class: the dataclass that declares them.
        names: names of its fields.
        **defaults: other defaults of the command, by name.
    """
    known = {field.name: field for field in fields(arguments_class)}
    for name in names:
        kind, default = known[name].type, defaults.get(name, known[name].default)
        if isinstance(kind, UnionType):
            kind = next(part for part in get_args(kind) if part is not NoneType)
        if get_origin(kind) is list:
            settings = {"nargs": "+", "type": get_args(kind)[0]}
        elif issubclass(kind, Enum):
            settings = {"choices": [member.value for member in kind]}
        else:
            settings = {"type": kind}
        default = default.value if isinstance(default, Enum) else default
        text = known[name].metadata["help"].replace("%", "%%")
        if default is not None and "default" not in text.lower():
            text += f" Default: {default}."
        parser.add_argument(f"--{name}", default=default, help=text, **settings)


def add_row_flags(parser: ArgumentParser) -> None:
    """Add the flags of unlabelled rows (`RowArguments`) to a command, or to a group of its flags."""
    parser.add_argument(
        "--text_column_names", nargs="+", help="One text column, or two for pairs. Default: the only one."
    )
    parser.add_argument(
        "--max_seq_length", type=int, default=128, help="Number of tokens to which texts are truncated. Default: 128."
    )
    parser.add_argument("--skip_empty", action="store_true", help="Skip rows without text.")
    parser.add_argument("--skip_corrupt", action="store_true", help="Skip images that cannot be decoded.")
