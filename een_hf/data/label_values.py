"""The values of a column of labels, names, numbers or lists, and the problem type that follows from them."""

import math
from typing import Any

import datasets

from .task import DataError


SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
LABEL_LISTS = (datasets.List, datasets.LargeList)


def problem_type_of(feature: Any, wanted: str | None, column: str, source: str) -> str:
    """The problem type of a column of labels, from its type and from the type that is `wanted`."""
    dtype, kind = getattr(feature, "dtype", ""), None
    if isinstance(feature, LABEL_LISTS):
        kind = MULTI_LABEL
    elif isinstance(feature, datasets.ClassLabel) or dtype in ("string", "large_string", "bool"):
        kind = SINGLE_LABEL
    elif dtype.startswith(("int", "uint")):
        kind = REGRESSION if wanted == REGRESSION else SINGLE_LABEL
    elif dtype.startswith("float"):
        kind = SINGLE_LABEL if wanted == SINGLE_LABEL else REGRESSION
    if kind is None and type(feature).__name__ == "Json":  # which early versions lack
        raise DataError(f"{source}: column {column!r} mixes strings, numbers or lists: give labels of one kind.")
    if kind is None:
        raise DataError(
            f"{source}: column {column!r} of type {feature} holds no labels; name one by --label_column_name."
        )
    if wanted not in (None, kind):
        raise DataError(
            f"{source}: column {column!r} of type {feature} does not fit {wanted}, which --problem_type or the "
            "checkpoint asks for. --ignore_mismatched_sizes gives the checkpoint a new head."
        )
    return kind


def label_values(rows: datasets.Dataset, column: str) -> list:
    """Labels by name where the column has names, else as they are; `None` where ClassLabel marks them as missing."""
    feature, values = rows.features[column], rows[column][:]
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.ClassLabel):
        return values

    def name(label):
        if isinstance(label, list):
            return [name(one) for one in label]
        return None if label is None or label < 0 else inner.names[label]

    return [name(label) for label in values]


def is_missing(label: Any) -> bool:
    if isinstance(label, list):
        return any(is_missing(one) for one in label)
    return label is None or (isinstance(label, float) and math.isnan(label))


def is_hidden(labels: list) -> bool:
    """Whether a test split says of no row what its label is."""
    return all(is_missing(label) or label == -1 for label in labels)


def finite_number(label: Any, where: str) -> float:
    number = float(label)
    if not math.isfinite(number):
        raise DataError(f"{where} has the label {number}: numbers to learn must be finite.")
    return number


def read_lists(
    values: dict[str, list], features: dict[str, Any], wanted: str | None, where: str
) -> tuple[dict[str, list], str, int | None]:
    """Lists of labels as lists of classes, or, for another `wanted` problem, as their only values.

    Lists of equal length with only 0 and 1 are multi-hot; other lists name their classes.

    Returns:
        the values by split, the problem type, and the length of multi-hot lists.
    """
    rows = [row for labels in values.values() for row in labels]
    lists = all(isinstance(feature, LABEL_LISTS) for feature in features.values())
    scalars = {getattr(getattr(feature, "feature", None), "dtype", None) for feature in features.values()}
    lengths = {len(row) for row in rows} if lists else set()
    named = any(isinstance(getattr(f, "feature", None), datasets.ClassLabel) for f in features.values())
    words = named or scalars <= {"string", "large_string"}
    if lengths == {1} and wanted in (SINGLE_LABEL, REGRESSION) and (wanted == SINGLE_LABEL or not words):
        return {split: [row[0] for row in labels] for split, labels in values.items()}, wanted, None
    if lists and wanted in (None, MULTI_LABEL):
        numeric = not words and all(isinstance(one, (bool, int, float)) for row in rows for one in row)
        clear = wanted == MULTI_LABEL or lengths != {1}
        if numeric and len(lengths) == 1 and clear and all(one in (0, 1) for row in rows for one in row):
            chosen = {s: [[i for i, one in enumerate(row) if one] for row in labels] for s, labels in values.items()}
            return chosen, MULTI_LABEL, lengths.pop()
        whole = numeric and all(type(one) is int and one >= 0 for row in rows for one in row)
        if words or whole and clear and all(len(row) == len({*row}) for row in rows):
            return values, MULTI_LABEL, None
    raise DataError(
        f"{where} holds lists of unclear meaning{f' for {wanted}' if wanted else ''}, for example {rows[0]!r}. Lists "
        "of equal length with only 0 and 1 mark the classes of a row; lists of names or of ids without "
        f"repetition name them. Say what they are by --problem_type: {MULTI_LABEL}, or {SINGLE_LABEL} or "
        f"{REGRESSION} for lists of one value."
    )


def declared_names(features: dict[str, Any]) -> list[str] | None:
    """Names that the data declare: of the training rows, else, where nothing is trained, of all splits together."""
    several = [features["train"]] if "train" in features else features.values()
    inner = [getattr(feature, "feature", feature) for feature in several]
    names = [name for feature in inner if isinstance(feature, datasets.ClassLabel) for name in feature.names]
    return list(dict.fromkeys(names)) or None
