"""Labels of a stream, which cannot all be read before training."""

from collections.abc import Sequence

import datasets

from .label_ids import label_index
from .label_values import LABEL_LISTS, REGRESSION, finite_number, is_missing, problem_type_of
from .task import DataError


SHUFFLE_BUFFER = 10_000  # rows of a stream


def labelled_stream(
    stream: datasets.IterableDataset,
    column: str,
    label_names: Sequence[str] | None,
    source: str,
    seed: int,
    wanted: str | None,
) -> tuple[datasets.IterableDataset, str, list[str] | None]:
    """The stream, shuffled in a buffer, with labels as class ids or numbers; its problem type and label names.

    Args:
        stream: training rows.
        column: column of the labels.
        label_names: label names of the splits in memory, or those that a task defines; `None`: those that the stream
            declares.
        source: name of the data in messages.
        seed: seed of the shuffle.
        wanted: the problem type, if it does not follow from the type of the labels.

    Raises:
        DataError: labels of a kind that a stream cannot number, or, while it is read, one without a number.
    """
    if column not in stream.features:
        raise DataError(f"{source} has no column {column!r}: name one by --label_column_name.")
    feature = stream.features[column]
    problem_type = problem_type_of(feature, wanted, column, source)
    # Without them a mapped stream no longer knows its columns.
    features = stream.features.copy()
    if problem_type == REGRESSION:
        features[column] = datasets.Value("float32")
        kwargs = {"column": column, "source": source}
        return _shuffled(stream.map(_as_float, fn_kwargs=kwargs, features=features), seed), problem_type, None
    names = label_names or getattr(feature, "names", None)
    if names is None or isinstance(feature, LABEL_LISTS):
        raise DataError(
            f"--streaming cannot know all labels of column {column!r} before training: give --task_name, a data set "
            "whose labels have names (one class per row), or --do_eval with a validation split that has all labels."
        )
    kwargs = {"column": column, "declared": getattr(feature, "names", None), "names": list(names), "source": source}
    features[column] = datasets.Value("int64")
    return _shuffled(stream.map(_number_label, fn_kwargs=kwargs, features=features), seed), problem_type, list(names)


def _shuffled(stream: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    return stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _as_float(row: dict, column: str, source: str) -> dict:
    if is_missing(row[column]):
        raise DataError(f"{source} has a row without a label in column {column!r}.")
    return {column: finite_number(row[column], f"{source}, column {column!r}")}


def _number_label(row: dict, column: str, declared: list[str] | None, names: list[str], source: str) -> dict:
    label = row[column]
    label = declared[label] if declared and isinstance(label, int) and label >= 0 else label
    number = label_index(names).get(label)
    if number is None:
        raise DataError(f"{source}, column {column!r} has the label {label!r}; the labels are: {', '.join(names)}.")
    return {column: number}
