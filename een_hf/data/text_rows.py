"""The text columns of a data set, and rows with missing texts."""

import logging
import re

import datasets

from .glue import GlueTask
from .sources import check_columns
from .task import ROW_ID, DataError, is_text_column
from .text_arguments import TextDataArguments


logger = logging.getLogger(__name__)


# As pandas names a column of a csv file that has no name, such as an index.
_UNNAMED = re.compile(r"Unnamed: \d+(\.\d+)?")


def text_columns(
    args: TextDataArguments, task: GlueTask | None, splits: dict, label_column: str, source: str
) -> list[str]:
    """The columns that the flag or the task names, else the only text column.

    Two text columns are read as a pair only if there is a label column: otherwise one of them may contain the labels.
    """
    columns = args.text_column_names or (list(task.text_columns) if task else None)
    if columns is None:
        rows = next(iter(splits.values()))
        most = 2 if label_column in rows.column_names else 1
        columns = [
            name
            for name, feature in rows.features.items()
            if is_text_column(feature) and name not in (label_column, ROW_ID) and not _UNNAMED.fullmatch(name)
        ]
        if not 1 <= len(columns) <= most:
            raise DataError(
                f"{source} has {len(columns)} columns of text; name one, or two for pairs, by --text_column_names. "
                f"Its columns are: {', '.join(rows.column_names)}."
            )
    for split, rows in splits.items():
        check_columns(rows, columns, "text_column_names", f"{source}, split {split!r}")
    return columns


def prepare_rows(
    rows: datasets.Dataset,
    columns: list[str],
    where: str,
    *,
    skip_empty: bool = False,
    blank_is_empty: bool = True,
    keep: bool = False,
) -> datasets.Dataset:
    """Text columns as strings without missing values, and a row id that stays with a row when rows are selected.

    Args:
        rows: with the columns.
        columns: of text.
        where: what the rows are called in messages.
        skip_empty: drop rows of which a text is missing, instead of raising DataError.
        blank_is_empty: whether a text of white space only counts as missing.
        keep: give such rows an empty text instead of dropping them.
    """
    for column in columns:
        if rows.features[column] != datasets.Value("string"):
            rows = _as_strings(rows, column, where)
    if ROW_ID not in rows.column_names:
        rows = rows.add_column(ROW_ID, list(range(len(rows))))
    texts = {column: rows[column][:] for column in columns}
    empty = {
        column: [row for row, text in enumerate(of_column) if _is_empty(text, blank_is_empty)]
        for column, of_column in texts.items()
    }
    broken = set().union(*empty.values())
    if not broken:
        return rows
    column, first = next((column, numbers[0]) for column, numbers in empty.items() if numbers)
    if not skip_empty:
        raise DataError(
            f"{where} has no text in column {column!r} of row {first} (counted from 0; {len(broken)} such rows of "
            f"{len(rows)}): fill it, or give --skip_empty to leave such rows out."
        )
    if not keep and len(broken) == len(rows):
        raise DataError(f"{where} has no row with text in {' and '.join(map(repr, columns))}: give rows with text.")
    done = "kept with an empty text" if keep else "left out"
    logger.warning("%s: %d of %d rows have no text and are %s.", where, len(broken), len(rows), done)
    if not keep:
        return rows.select([row for row in range(len(rows)) if row not in broken])
    for column in columns:
        rows = rows.remove_columns(column).add_column(column, [text or "" for text in texts[column]])
    return rows


def _as_strings(rows: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    """The rows with a column, of numbers for example, as strings."""
    try:
        return rows.cast_column(column, datasets.Value("string"))
    except (TypeError, ValueError) as error:  # which pyarrow's errors are
        raise DataError(f"{where}: column {column!r} of type {rows.features[column]} holds no texts.") from error


def prepare_stream(
    rows: datasets.IterableDataset, columns: list[str], source: str, *, skip_empty: bool, blank_is_empty: bool
) -> datasets.IterableDataset:
    """`prepare_rows` for a stream, which is looked through while it is read."""
    settings = {"columns": columns, "source": source, "skip_empty": skip_empty, "blank_is_empty": blank_is_empty}
    return rows.filter(_has_text, fn_kwargs=settings)


def _has_text(row: dict, columns: list[str], source: str, skip_empty: bool, blank_is_empty: bool) -> bool:
    column = next((column for column in columns if _is_empty(row[column], blank_is_empty)), None)
    if column is not None and not skip_empty:
        raise DataError(
            f"{source} has a row without text in column {column!r}: fill it, or give --skip_empty to leave such rows "
            "out."
        )
    return column is None


def _is_empty(text: str | None, blank_is_empty: bool) -> bool:
    return text is None or (blank_is_empty and not str(text).strip())
