"""Labels of a data set: the problem type, the label names, and the conversion to class ids or numbers."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import datasets

from .._deprecated import moved_names
from .label_ids import label_index
from .label_streams import labelled_stream
from .label_values import (
    LABEL_LISTS,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    declared_names,
    finite_number,
    is_hidden,
    is_missing,
    label_values,
    problem_type_of,
    read_lists,
)
from .task import DataError, TaskData


logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "fine_label", "labels")  # the first that exists is used, if no flag names another

# Spellings of missing values in tables.
_NOTHING = {"na", "n/a", "nan", "nil", "none", "null", "-", "?"}

_NOTHING |= {sign + word for sign in ("", "+", "-") for word in ("inf", "infinity")}
_LIST = re.compile(r"\[\s*\]|\[[\s\d.,+-]+\]|\[\s*(['\"]).*\1\s*\]")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def resolve_labels(
    splits: dict,
    column: str,
    known: Sequence[str] | None,
    source: str,
    seed: int = 0,
    *,
    like: TaskData | None = None,
    problem_type: str | None = None,
    declared: Sequence[str] | None = None,
) -> tuple[dict, str, list[str] | None]:
    """Convert labels to class ids, numbers or lists of class ids, and determine problem type and label names.

    Args:
        splits: data sets by name.
        column: column of the labels.
        known: label names that a task or a partition defines, empty for regression; `None`: none does.
        source: name of the data in messages.
        seed: seed of the shuffle of a stream.
        like: data with the same labels, whose names are used if no split has labels.
        problem_type: the problem type, if it does not follow from the type of the labels.
        declared: label names that other rows of the same data declare; they precede those that these rows declare.

    Returns:
        the splits, their problem type, and their label names.

    Raises:
        DataError: labels that are missing, mixed, unknown or of unclear meaning.
    """
    if isinstance(splits.get("train"), datasets.IterableDataset):
        return _resolve_stream(splits, column, known, source, seed, like, problem_type)
    values = {split: label_values(rows, column) for split, rows in splits.items() if column in rows.column_names}
    hidden = [split for split, labels in values.items() if split.startswith("test") and is_hidden(labels)]
    splits = {split: rows.remove_columns(column) if split in hidden else rows for split, rows in splits.items()}
    values = {split: labels for split, labels in values.items() if split not in hidden}
    if not values:
        return splits, *_without_labels(known, source, like)
    _refuse_missing(values, column, source)
    features = {split: splits[split].features[column] for split in values}
    wanted, where = _wanted(problem_type, known, like), f"{source}, column {column!r}"
    values, kind, width = _read_values(values, features, wanted, column, source, like)
    if kind == REGRESSION:
        label_names, feature = None, datasets.Value("float32")
        numbers = {split: [finite_number(label, where) for label in labels] for split, labels in values.items()}
        if wanted is None and all(number.is_integer() for labels in numbers.values() for number in labels):
            logger.warning(
                "%s: whole numbers with a decimal point are learned as numbers; for classes give --problem_type %s.",
                where,
                SINGLE_LABEL,
            )
    else:
        declared = declared or declared_names(features) or (width and [str(number) for number in range(width)])
        label_names, index = _number_labels(values, declared, known, where)
        _check_several(label_names, kind, like, where)
        feature = datasets.ClassLabel(names=label_names)
        if kind == MULTI_LABEL:
            feature = datasets.List(feature)
            numbers = {split: [[index[one] for one in label] for label in labels] for split, labels in values.items()}
        else:
            numbers = {split: [index[label] for label in labels] for split, labels in values.items()}
    for split, labels in numbers.items():
        splits[split] = splits[split].remove_columns(column).add_column(column, labels, feature=feature)
    return splits, kind, label_names


def _resolve_stream(
    splits: dict,
    column: str,
    known: Sequence[str] | None,
    source: str,
    seed: int,
    like: TaskData | None,
    problem_type: str | None,
) -> tuple[dict, str, list[str] | None]:
    """`resolve_labels` for training rows that are a stream, whose labels follow from the splits in memory."""
    stream, held = splits["train"], {split: rows for split, rows in splits.items() if split != "train"}
    declared = getattr(stream.features.get(column), "names", None)
    label_names, kinds = known, {}
    labelled = [split for split, rows in held.items() if column in rows.column_names]
    if labelled:
        fixed = declared if known is None else known
        settings = {"like": like, "problem_type": problem_type, "declared": declared}
        held, kinds[labelled[0]], label_names = resolve_labels(held, column, fixed, source, **settings)
    wanted = _wanted(problem_type, known, like)
    stream, kind, label_names = labelled_stream(stream, column, label_names, source, seed, wanted)
    _check_kinds({"train": kind, **kinds}, column, source)
    _check_several(label_names, kind, like, f"{source}, column {column!r}")
    return {"train": stream, **held}, kind, label_names


def _without_labels(known: Sequence[str] | None, source: str, like: TaskData | None) -> tuple[str, list[str] | None]:
    """The problem type and label names of rows without labels."""
    if known is not None:
        return SINGLE_LABEL if known else REGRESSION, list(known) or None
    if like is None:
        raise DataError(
            f"{source} has no labels, so that the labels to predict are not known: give a fine-tuned model, also a "
            "--train_file or --validation_file with labels, or --task_name."
        )
    return like.problem_type, like.label_names


def _refuse_missing(values: dict[str, list], column: str, source: str) -> None:
    for split, labels in values.items():
        missing = next((row for row, label in enumerate(labels) if is_missing(label)), None)
        if missing is not None:
            raise DataError(
                f"{source}, split {split!r} has no label in column {column!r} of row {missing} (counted from 0)."
            )


def _read_values(
    values: dict[str, list],
    features: dict[str, Any],
    wanted: str | None,
    column: str,
    source: str,
    like: TaskData | None,
) -> tuple[dict[str, list], str, int | None]:
    """Labels by split, with lists converted; the problem type; and the length of multi-hot lists."""
    if not any(isinstance(feature, LABEL_LISTS) for feature in features.values()):
        kinds = {split: problem_type_of(feature, wanted, column, source) for split, feature in features.items()}
        return values, _check_kinds(kinds, column, source), None
    where = f"{source}, column {column!r}"
    values, kind, width = read_lists(values, features, wanted, where)
    if width and like is not None and width != like.num_labels:
        raise DataError(
            f"{where} marks {width} classes in each row, the model has {like.num_labels}: give lists as long as "
            "its labels, or --ignore_mismatched_sizes for a new head."
        )
    return values, kind, width


def find_label_column(splits: dict, given: str | None = None) -> str:
    """The column of the labels: the given one, else the first of `LABEL_COLUMNS` that a split has.

    Args:
        splits: data sets by name.
        given: the value of `--label_column_name`.

    Returns:
        its name.
    """
    found = (name for name in LABEL_COLUMNS if any(name in rows.column_names for rows in splits.values()))
    return given or next(found, LABEL_COLUMNS[0])


def _wanted(problem_type: str | None, known: Sequence[str] | None, like: TaskData | None) -> str | None:
    """The problem type that the labels must have; `None`: it follows from their type."""
    if known is not None and not known:
        return REGRESSION
    if problem_type is None and not known and like is not None and like.problem_type != SINGLE_LABEL:
        return like.problem_type
    return problem_type


def _check_kinds(kinds: dict[str, str], column: str, source: str) -> str:
    """The problem type of all splits, which must agree."""
    (first, kind), *others = kinds.items()
    for split, other in others:
        if other != kind:
            raise DataError(
                f"{source}: column {column!r} means {kind} in split {first!r}, but {other} in split {split!r}."
            )
    return kind


def _check_several(names: Sequence[str] | None, kind: str, like: TaskData | None, where: str) -> None:
    """Raise DataError for data of a single class, unless they are rows of a problem that is known."""
    if like is None and (not names and kind == MULTI_LABEL or len(names or ()) == 1 and kind == SINGLE_LABEL):
        found = f"one class only, {names[0]!r}" if names else "lists without any class"
        raise DataError(f"{where} holds {found}: give rows of at least two classes.")


def _number_labels(
    values: dict[str, list], declared: list[str] | None, known: Sequence[str] | None, where: str
) -> tuple[list[str], dict[Any, int]]:
    """Label names in the order of their ids, and the id of each label that occurs.

    The order is that of the data (ClassLabel), else of `known`, else sorted. A whole number is the id of a label, or
    its name if all names are numbers.
    """
    found = {split: {one for row in rows for one in _as_list(row)} for split, rows in values.items()}
    labels = set().union(*found.values())
    names = declared or (list(known) if known else None)
    _check_classes(labels, where)
    trained = found.get("train", labels)
    new = [(split, label) for split, of_split in found.items() for label in sorted(of_split - trained, key=str)]
    if names is None:
        if len({isinstance(label, str) for label in labels}) > 1:
            raise DataError(f"{where} has labels that are strings and labels that are numbers.")
        if new:
            split, label = new[0]
            raise DataError(
                f"{where} has the label {label!r} in split {split!r}, but in no row of split 'train': the class would "
                "never be trained. Correct the label, remove the row, or train on rows with this label."
            )
        order = sorted(labels)
        names = [str(int(label) if isinstance(label, float) else label) for label in order]
        return names, {label: number for number, label in enumerate(order)}
    index = label_index(names)
    unknown = [label for label in labels if label not in index]
    if unknown:
        raise DataError(f"{where} has the label {min(unknown, key=str)!r}; the labels are: {', '.join(names)}.")
    never = sorted({index[label] for _, label in new} - {index[label] for label in trained})
    if never:
        shown = ", ".join(names[number] for number in never[:5]) + (", ..." if len(never) > 5 else "")
        logger.warning("%s: no row of split 'train' has the labels of %d other classes: %s.", where, len(never), shown)
    return names, index


def _as_list(row: Any) -> list:
    return row if isinstance(row, list) else [row]


def _check_classes(labels: set, where: str) -> None:
    """Raise DataError for labels that are classes only because a table was read wrongly."""
    broken = next((label for label in labels if isinstance(label, float) and not label.is_integer()), None)
    if broken is not None:
        raise DataError(
            f"{where} has the label {broken!r}: --problem_type {SINGLE_LABEL} takes whole numbers or strings."
        )
    words = {label for label in labels if isinstance(label, str)}
    if words and all(map(_LIST.fullmatch, words)):
        raise DataError(
            f"{where} holds lists as text, for example {min(words)!r}: a csv file has no lists, give json or parquet."
        )
    others = {word for word in words if not _NUMBER.fullmatch(word)}
    if others and others < words and all(word.strip().lower() in _NOTHING for word in others):
        raise DataError(
            f"{where} has the label {min(others)!r} among numbers: remove rows without a label or with an infinite "
            "one, or rename the class."
        )


__getattr__ = moved_names(__name__)
