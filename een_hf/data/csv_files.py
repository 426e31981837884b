"""csv files in UTF-8, separated by commas, with empty fields for missing values; errors say how to convert others."""

import csv
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from .task import DataError


_STREAM_ROWS = 100_000  # number of rows of a stream from which the types of its columns are inferred
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# Types, narrower ones first, with the pattern that all values of a column must have. Values with leading zeros, or
# with more digits than a number can store, are text.
_TYPES = {
    "bool": re.compile(r"True|TRUE|true|False|FALSE|false"),
    "int64": re.compile(r"0|-?[1-9]\d{0,17}"),
    "float64": re.compile(r"[+-]?((0|[1-9]\d{0,17})(\.\d*)?|\.\d+)([eE][+-]?\d+)?"),
}


def csv_settings(path: str, source: str, text_columns: Sequence[str] = (), streaming: bool = False) -> dict[str, Any]:
    """Check a csv file, and determine the settings with which `datasets` must read it.

    Strings such as `null`, `NA` or `None` are text, not missing values. A column is one of numbers only if all its
    values are numbers.

    Args:
        path: the file.
        source: name of the file in messages.
        text_columns: columns that are always text.
        streaming: check only the first 100,000 rows.

    Raises:
        DataError: another encoding or separator, no rows, a column that is named twice, or a row with too few or too
            many fields.
    """
    with open(path, encoding="utf-8-sig", newline="") as file, _long_fields():
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            _check_header(header, source)
            header = _named(header)
            rows = _whole_rows(reader, header, source)
            types, num_rows = _column_types(itertools.islice(rows, _STREAM_ROWS if streaming else None), header)
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, source) from error
        except csv.Error as error:
            raise DataError(f"{source}, line {reader.line_num}, cannot be read as csv: {error}.") from error
    if not num_rows:
        raise DataError(f"{source} has a header ({', '.join(header)}) but no rows: give a file with rows.")
    types |= {name: "string" for name in text_columns if name in types}
    return {
        "encoding": "utf-8-sig",
        "keep_default_na": False,
        "na_values": [""],
        "skip_blank_lines": len(header) > 1,
        "features": datasets.Features({name: datasets.Value(types[name]) for name in header}),
    }


@contextmanager
def _long_fields() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def check_text_file(path: str, source: str, *, to_the_end: bool) -> None:
    """Raise DataError for a file, csv or json, that is empty, no text, or in UTF-16 or, read to the end, not UTF-8."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start.strip():
        raise DataError(f"{source} is empty: give a file with rows.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source} is encoded in UTF-16: {_remedy(path, 'UTF-16')}")
    if b"\0" in start:
        raise DataError(f"{source} is no text file: it contains bytes of value 0.")
    if to_the_end:
        try:
            with open(path, encoding="utf-8") as file:
                while file.read(1 << 20):
                    pass
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, source) from error


def _wrong_encoding(path: str, source: str) -> DataError:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return DataError(
                    f"{source}, line {number}, is not UTF-8 (byte 0x{byte:02x}), but perhaps Latin-1: "
                    f"{_remedy(path, 'LATIN1')}"
                )
    return DataError(f"{source} is not UTF-8: {_remedy(path, 'LATIN1')}")


def _remedy(path: str, encoding: str) -> str:
    words = shlex.join(["iconv", "-f", encoding, "-t", "UTF-8", str(path)])
    return f"convert it, for example by `{words} > utf8{Path(path).suffix}`."


def _check_header(header: list[str], source: str) -> None:
    if len(header) == 1:
        separator = next((one for one in _SEPARATORS if one in header[0]), None)
        if separator is not None:
            raise DataError(
                f"{source} is separated by {_SEPARATORS[separator]}: its only column is {header[0]!r}. Write it with "
                f"commas, for example by pandas: `read_csv(..., sep={separator!r}, keep_default_na=False).to_csv(..., "
                "index=False)`."
            )
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{source} names the column {twice!r} twice: rename one of them.")


def _named(header: list[str]) -> list[str]:
    """The header as pandas reads it: columns without a name, of which an index is one, get a name of their own."""
    named = list(header)
    for place, name in enumerate(header):
        if not name:
            names = (f"Unnamed: {place}" + (f".{count}" if count else "") for count in itertools.count())
            named[place] = next(name for name in names if name not in named)
    return named


def _whole_rows(reader, header: list[str], source: str) -> Iterator[list[str]]:
    """Rows as long as the header. A blank line is skipped; in a file of one column it is an empty text."""
    for row in reader:
        if not row and len(header) == 1:
            row = [""]
        if row and len(row) != len(header):
            raise DataError(
                f"{source}, line {reader.line_num}, has {len(row)} fields, but the header has {len(header)}: put "
                'fields with commas or line breaks between double quotes ("), and double any quotes inside.'
            )
        if row:
            yield row


def _column_types(rows: Iterator[list[str]], header: list[str]) -> tuple[dict[str, str], int]:
    """The type of each column, and the number of rows."""
    types: list[str | None] = [None] * len(header)
    gaps, num_rows = set(), 0
    for row in rows:
        num_rows += 1
        for column, value in enumerate(row):
            kind = types[column]
            if not value:
                gaps.add(column)
            elif kind is None:
                types[column] = next((kind for kind, look in _TYPES.items() if look.fullmatch(value)), "string")
            elif kind != "string" and not _TYPES[kind].fullmatch(value):
                is_float = kind == "int64" and _TYPES["float64"].fullmatch(value)
                types[column] = "float64" if is_float else "string"
    for column in gaps:  # there is no missing whole number or truth value
        types[column] = "float64" if types[column] in ("int64", "float64") else "string"
    return dict(zip(header, types, strict=True)), num_rows
