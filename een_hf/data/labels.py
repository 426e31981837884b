"""Labels of a data set: what kind of problem they pose, their names, and the model's ids for them."""

import math
from collections.abc import Sequence
from typing import Any

import datasets

from .task import DataError, TaskData


SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
SHUFFLE_BUFFER = 10_000  # rows of a stream


def resolve_labels(
    splits: dict, column: str, task_labels: Sequence[str] | None, source: str, seed: int = 0
) -> tuple[dict, str, list[str] | None]:
    """Splits whose labels are class ids, numbers or lists of class ids, their problem type and their label names.

    Args:
        splits: data sets by name.
        column: of the labels.
        task_labels: label names that a task fixes, none for regression; `None` without a task.
        source: what the data are called in messages.
        seed: of the shuffle of a stream.

    Raises:
        DataError: labels that are missing, mixed or unknown.
    """
    stream = splits.get("train")
    if isinstance(stream, datasets.IterableDataset):
        held = {split: rows for split, rows in splits.items() if split != "train"}
        declared = getattr(stream.features.get(column), "names", None)
        known = declared if task_labels is None else task_labels
        label_names = None
        if any(column in rows.column_names for rows in held.values()):
            held, _, label_names = resolve_labels(held, column, known, source)
        stream, problem_type, label_names = _labelled_stream(stream, column, label_names, known, source, seed)
        return {"train": stream, **held}, problem_type, label_names
    values = {split: _label_values(rows, column) for split, rows in splits.items() if column in rows.column_names}
    hidden = [split for split, labels in values.items() if split.startswith("test") and _is_hidden(labels)]
    splits = {split: rows.remove_columns(column) if split in hidden else rows for split, rows in splits.items()}
    values = {split: labels for split, labels in values.items() if split not in hidden}
    if not values:
        if task_labels is None:
            raise DataError(
                f"{source} has no labels, so that nothing says what is predicted: give a --train_file or "
                "--validation_file with labels too, or --task_name."
            )
        return splits, SINGLE_LABEL if task_labels else REGRESSION, list(task_labels) or None
    for split, labels in values.items():
        missing = next((row for row, label in enumerate(labels) if _is_missing(label)), None)
        if missing is not None:
            raise DataError(
                f"{source}, split {split!r} has no label in column {column!r} of row {missing} (counted from 0)."
            )

    kinds = {split: problem_type_of(splits[split].features[column], task_labels, column, source) for split in values}
    problem_type = next(iter(kinds.values()))
    for split, kind in kinds.items():
        if kind != problem_type:
            first = next(iter(kinds))
            raise DataError(
                f"{source}: column {column!r} means {problem_type} in split {first!r}, but {kind} in split {split!r}."
            )
    if problem_type == REGRESSION:
        label_names, feature = None, datasets.Value("float32")
        numbers = {split: [float(label) for label in labels] for split, labels in values.items()}
    else:
        feature = splits[next(iter(values))].features[column]
        declared = getattr(getattr(feature, "feature", feature), "names", None)
        label_names, index = _number_labels(values, declared, task_labels, f"{source}, column {column!r}")
        feature = datasets.ClassLabel(names=label_names)
        if problem_type == MULTI_LABEL:
            feature = datasets.List(feature)
            numbers = {split: [[index[one] for one in label] for label in labels] for split, labels in values.items()}
        else:
            numbers = {split: [index[label] for label in labels] for split, labels in values.items()}
    for split, labels in numbers.items():
        splits[split] = splits[split].remove_columns(column).add_column(column, labels, feature=feature)
    return splits, problem_type, label_names


def _labelled_stream(
    stream: datasets.IterableDataset,
    column: str,
    label_names: Sequence[str] | None,
    task_labels: Sequence[str] | None,
    source: str,
    seed: int,
) -> tuple[datasets.IterableDataset, str, list[str] | None]:
    """The stream shuffled in a buffer, its labels as class ids or numbers; the problem type and label names.

    Args:
        stream: training rows.
        column: of the labels.
        label_names: of the splits that are held, or `None`.
        task_labels: names that a task fixes, none for regression; `None` without a task.
        source: what the data are called in messages.
        seed: of the shuffle.

    Raises:
        DataError: labels of a kind that a stream cannot number, or, while it is read, one without a number.
    """
    if column not in stream.features:
        raise DataError(f"{source} has no column {column!r}: name one by --label_column_name.")
    feature = stream.features[column]
    problem_type = problem_type_of(feature, task_labels, column, source)
    # Without them a mapped stream no longer knows its columns.
    features = stream.features.copy()
    if problem_type == REGRESSION:
        features[column] = datasets.Value("float32")
        kwargs = {"column": column, "source": source}
        return _shuffled(stream.map(_as_float, fn_kwargs=kwargs, features=features), seed), problem_type, None
    names = getattr(feature, "names", None) or task_labels or label_names
    if names is None or isinstance(feature, datasets.List):
        raise DataError(
            f"--streaming cannot know all labels of column {column!r} beforehand: give --task_name, a data set whose "
            "labels have names (one class per row), or --do_eval with a validation split that holds them all."
        )
    kwargs = {"column": column, "declared": getattr(feature, "names", None), "names": list(names), "source": source}
    features[column] = datasets.Value("int64")
    return _shuffled(stream.map(_number_label, fn_kwargs=kwargs, features=features), seed), problem_type, list(names)


def _shuffled(stream: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    return stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _as_float(row: dict, column: str, source: str) -> dict:
    if _is_missing(row[column]):
        raise DataError(f"{source} has a row without a label in column {column!r}.")
    return {column: float(row[column])}


def _number_label(row: dict, column: str, declared: list[str] | None, names: list[str], source: str) -> dict:
    label = row[column]
    label = declared[label] if declared and isinstance(label, int) and label >= 0 else label
    number = label_index(names).get(label)
    if number is None:
        raise DataError(f"{source}, column {column!r} has the label {label!r}; the labels are: {', '.join(names)}.")
    return {column: number}


def _label_values(rows: datasets.Dataset, column: str) -> list:
    """Labels by name where the column has names, else as they are; `None` where ClassLabel says that there is none."""
    feature, values = rows.features[column], rows[column][:]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.ClassLabel):
        return values

    def name(label):
        if isinstance(label, list):
            return [name(one) for one in label]
        return None if label is None or label < 0 else inner.names[label]

    return [name(label) for label in values]


def _is_missing(label: Any) -> bool:
    if isinstance(label, list):
        return any(_is_missing(one) for one in label)
    return label is None or (isinstance(label, float) and math.isnan(label))


def _is_hidden(labels: list) -> bool:
    """Whether a test split says of no row what its label is."""
    return all(_is_missing(label) or label == -1 for label in labels)


def problem_type_of(feature: Any, task_labels: Sequence[str] | None, column: str, source: str) -> str:
    """What a column of labels poses, from its type."""
    if isinstance(feature, datasets.ClassLabel):
        return SINGLE_LABEL
    if isinstance(feature, datasets.List):
        kind = problem_type_of(feature.feature, task_labels, column, source)
        if kind == SINGLE_LABEL:
            return MULTI_LABEL
    dtype = getattr(feature, "dtype", "")
    if dtype.startswith("float") or (
        dtype.startswith(("int", "uint")) and task_labels is not None and not task_labels
    ):
        return REGRESSION
    if dtype.startswith(("int", "uint")) or dtype in ("string", "large_string", "bool"):
        return SINGLE_LABEL
    raise DataError(f"{source}: column {column!r} of type {feature} holds no labels; name one by --label_column_name.")


def label_index(names: Sequence[str]) -> dict[str | int, int]:
    """The id of each label, by its name and by its number."""
    return {name: number for number, name in enumerate(names)} | {number: number for number in range(len(names))}


def _number_labels(
    values: dict[str, list], declared: list[str] | None, task_labels: Sequence[str] | None, where: str
) -> tuple[list[str], dict[Any, int]]:
    """Label names in the order of their ids, and the id of each label that occurs.

    The order is the data's own (ClassLabel), else the task's, else sorted. A whole number stands for the task's label
    of that id; without a task it is its own name.
    """
    labels = {one for rows in values.values() for row in rows for one in (row if isinstance(row, list) else [row])}
    if len({isinstance(label, str) for label in labels}) > 1:
        raise DataError(f"{where} has labels that are words and labels that are numbers.")
    names = declared or (list(task_labels) if task_labels else None)
    if names is None:
        order = sorted(labels)
        return [str(label) for label in order], {label: number for number, label in enumerate(order)}
    index = label_index(names)
    unknown = [label for label in labels if label not in index]
    if unknown:
        raise DataError(f"{where} has the label {min(unknown)!r}; the labels are: {', '.join(names)}.")
    return names, index


def model_label_ids(data: TaskData, label2id: dict[str, int] | None) -> list[int]:
    """The model's id of each of the data's labels.

    Labels are matched by name, in either case. Where one side only has numbers (`LABEL_0`, or data with whole numbers
    as labels), the number is the id.
    """
    names = data.label_names
    if label2id is None:
        return list(range(len(names)))
    known = {name.lower(): number for name, number in label2id.items()}
    if all(name == f"label_{number}" for name, number in known.items()):
        known = {name.lower(): number for number, name in enumerate(names) if number < len(known)}
    elif all(name.isdigit() for name in names) and not any(name in known for name in names):
        known = {str(number): number for number in label2id.values()}
    unknown = [name for name in names if name.lower() not in known]
    if unknown:
        raise DataError(
            f"Column {data.label_column!r} has the label {unknown[0]!r}, which the model does not know; it knows: "
            f"{', '.join(label2id)}. Give --ignore_mismatched_sizes to make the head anew, or relabel the data."
        )
    return [known[name.lower()] for name in names]
