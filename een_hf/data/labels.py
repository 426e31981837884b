"""Labels of a data set: what kind of problem they pose, their names, and the model's ids for them."""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets

from .task import DataError, TaskData


logger = logging.getLogger(__name__)

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
SHUFFLE_BUFFER = 10_000  # rows of a stream
_LISTS = (datasets.List, datasets.LargeList)
# What tables write for a value that is not there.
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
    """Splits whose labels are class ids, numbers or lists of class ids, their problem type and their label names.

    Args:
        splits: data sets by name.
        column: of the labels.
        known: label names that a task or a partition fixes, none for regression; `None` without.
        source: what the data are called in messages.
        seed: of the shuffle of a stream.
        like: data whose problem these pose; where no split has labels, its names are theirs.
        problem_type: what the labels mean, where their type does not say it.
        declared: label names that other rows of the same data declare, which go before those that these declare.

    Raises:
        DataError: labels that are missing, mixed, unknown or of unclear meaning.
    """
    stream = splits.get("train")
    if isinstance(stream, datasets.IterableDataset):
        held = {split: rows for split, rows in splits.items() if split != "train"}
        declared = getattr(stream.features.get(column), "names", None)
        label_names, kinds = known, {}
        labelled = [split for split, rows in held.items() if column in rows.column_names]
        if labelled:
            fixed = declared if known is None else known
            settings = {"like": like, "problem_type": problem_type, "declared": declared}
            held, kinds[labelled[0]], label_names = resolve_labels(held, column, fixed, source, **settings)
        wanted = _wanted(problem_type, known, like)
        stream, kind, label_names = _labelled_stream(stream, column, label_names, source, seed, wanted)
        _check_kinds({"train": kind, **kinds}, column, source)
        _check_several(label_names, kind, like, f"{source}, column {column!r}")
        return {"train": stream, **held}, kind, label_names
    values = {split: _label_values(rows, column) for split, rows in splits.items() if column in rows.column_names}
    hidden = [split for split, labels in values.items() if split.startswith("test") and _is_hidden(labels)]
    splits = {split: rows.remove_columns(column) if split in hidden else rows for split, rows in splits.items()}
    values = {split: labels for split, labels in values.items() if split not in hidden}
    if not values:
        if known is not None:
            return splits, SINGLE_LABEL if known else REGRESSION, list(known) or None
        if like is None:
            raise DataError(
                f"{source} has no labels, so that nothing says what is predicted: give a fine-tuned model, a "
                "--train_file or --validation_file with labels too, or --task_name."
            )
        return splits, like.problem_type, like.label_names
    for split, labels in values.items():
        missing = next((row for row, label in enumerate(labels) if _is_missing(label)), None)
        if missing is not None:
            raise DataError(
                f"{source}, split {split!r} has no label in column {column!r} of row {missing} (counted from 0)."
            )

    features = {split: splits[split].features[column] for split in values}
    wanted, where = _wanted(problem_type, known, like), f"{source}, column {column!r}"
    declared = declared or _declared_names(features)
    if any(isinstance(feature, _LISTS) for feature in features.values()):
        values, kind, width = _read_lists(values, features, wanted, where)
        if width and like is not None and width != like.num_labels:
            raise DataError(
                f"{where} marks {width} classes in each row, the model has {like.num_labels}: give lists as long as "
                "its labels, or --ignore_mismatched_sizes to make the head anew."
            )
        declared = declared or (width and [str(number) for number in range(width)])
    else:
        kinds = {split: problem_type_of(feature, wanted, column, source) for split, feature in features.items()}
        kind = _check_kinds(kinds, column, source)
    if kind == REGRESSION:
        label_names, feature = None, datasets.Value("float32")
        numbers = {split: [_finite(label, where) for label in labels] for split, labels in values.items()}
        if wanted is None and all(number.is_integer() for labels in numbers.values() for number in labels):
            logger.warning(
                "%s: whole numbers with a decimal point are learned as numbers; for classes give --problem_type %s.",
                where,
                SINGLE_LABEL,
            )
    else:
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


def _wanted(problem_type: str | None, known: Sequence[str] | None, like: TaskData | None) -> str | None:
    """The problem type that the labels must fit; `None` where their type decides between classes and numbers."""
    if known is not None and not known:
        return REGRESSION
    if problem_type is None and not known and like is not None and like.problem_type != SINGLE_LABEL:
        return like.problem_type
    return problem_type


def _check_kinds(kinds: dict[str, str], column: str, source: str) -> str:
    """The problem that all splits pose."""
    (first, kind), *others = kinds.items()
    for split, other in others:
        if other != kind:
            raise DataError(
                f"{source}: column {column!r} means {kind} in split {first!r}, but {other} in split {split!r}."
            )
    return kind


def _check_several(names: Sequence[str] | None, kind: str, like: TaskData | None, where: str) -> None:
    """Refuse data without anything to tell apart, unless they are some rows of a problem that is known."""
    if like is None and (not names and kind == MULTI_LABEL or len(names or ()) == 1 and kind == SINGLE_LABEL):
        found = f"one class only, {names[0]!r}" if names else "lists without any class"
        raise DataError(f"{where} holds {found}: give rows of at least two classes.")


def _declared_names(features: dict[str, Any]) -> list[str] | None:
    """Names that the data declare: of the training rows, else, where nothing is trained, of all splits together."""
    several = [features["train"]] if "train" in features else features.values()
    inner = [getattr(feature, "feature", feature) for feature in several]
    names = [name for feature in inner if isinstance(feature, datasets.ClassLabel) for name in feature.names]
    return list(dict.fromkeys(names)) or None


def _read_lists(
    values: dict[str, list], features: dict[str, Any], wanted: str | None, where: str
) -> tuple[dict[str, list], str, int | None]:
    """Lists of labels as lists of classes, or, for another `wanted` problem, as their only values.

    Lists of equal length with only 0 and 1 are multi-hot; other lists name their classes.

    Returns:
        the values by split, the problem type, and the length of multi-hot lists.
    """
    rows = [row for labels in values.values() for row in labels]
    lists = all(isinstance(feature, _LISTS) for feature in features.values())
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
        "of equal length with only 0 and 1 mark the classes of a row; lists of words or of ids without "
        f"repetition name them. Say what they are by --problem_type: {MULTI_LABEL}, or {SINGLE_LABEL} or "
        f"{REGRESSION} for lists of one value."
    )


def _labelled_stream(
    stream: datasets.IterableDataset,
    column: str,
    label_names: Sequence[str] | None,
    source: str,
    seed: int,
    wanted: str | None,
) -> tuple[datasets.IterableDataset, str, list[str] | None]:
    """The stream shuffled in a buffer, its labels as class ids or numbers; the problem type and label names.

    Args:
        stream: training rows.
        column: of the labels.
        label_names: of the splits that are held, else those that a task fixes; `None`: those that the stream declares.
        source: what the data are called in messages.
        seed: of the shuffle.
        wanted: problem type, where the type of the labels does not say it.

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
    if names is None or isinstance(feature, _LISTS):
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
    return {column: _finite(row[column], f"{source}, column {column!r}")}


def _finite(label: Any, where: str) -> float:
    number = float(label)
    if not math.isfinite(number):
        raise DataError(f"{where} has the label {number}: numbers to learn must be finite.")
    return number


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


def problem_type_of(feature: Any, wanted: str | None, column: str, source: str) -> str:
    """What a column of labels poses, from its type and from what is `wanted` of it."""
    dtype, kind = getattr(feature, "dtype", ""), None
    if isinstance(feature, _LISTS):
        kind = MULTI_LABEL
    elif isinstance(feature, datasets.ClassLabel) or dtype in ("string", "large_string", "bool"):
        kind = SINGLE_LABEL
    elif dtype.startswith(("int", "uint")):
        kind = REGRESSION if wanted == REGRESSION else SINGLE_LABEL
    elif dtype.startswith("float"):
        kind = SINGLE_LABEL if wanted == SINGLE_LABEL else REGRESSION
    if kind is None and type(feature).__name__ == "Json":  # which early versions lack
        raise DataError(f"{source}: column {column!r} mixes words, numbers or lists: give labels of one kind.")
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


def label_index(names: Sequence[str]) -> dict[str | int, int]:
    """The id of each label, by its name and by its number, which is its name where all names are numbers."""
    index = {name: number for number, name in enumerate(names)}
    if all(map(_is_whole_number, names)):
        return index | {int(name): number for name, number in index.items()}
    return index | {number: number for number in range(len(names))}


def _is_whole_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None and name == str(int(name))


def _number_labels(
    values: dict[str, list], declared: list[str] | None, known: Sequence[str] | None, where: str
) -> tuple[list[str], dict[Any, int]]:
    """Label names in the order of their ids, and the id of each label that occurs.

    The order is the data's own (ClassLabel), else the one that is known, else sorted. A whole number stands for the
    name of that id, or for itself where all names are numbers.
    """
    found = {split: {one for row in rows for one in _as_list(row)} for split, rows in values.items()}
    labels = set().union(*found.values())
    names = declared or (list(known) if known else None)
    _check_classes(labels, where)
    trained = found.get("train", labels)
    new = [(split, label) for split, of_split in found.items() for label in sorted(of_split - trained, key=str)]
    if names is None:
        if len({isinstance(label, str) for label in labels}) > 1:
            raise DataError(f"{where} has labels that are words and labels that are numbers.")
        if new:
            split, label = new[0]
            raise DataError(
                f"{where} has the label {label!r} in split {split!r}, but in no row of split 'train': it would become "
                "a class that is never trained. Correct the label, leave the row out, or train on rows that have it."
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
    """Refuse labels that look like classes only because a table was read so."""
    broken = next((label for label in labels if isinstance(label, float) and not label.is_integer()), None)
    if broken is not None:
        raise DataError(
            f"{where} has the label {broken!r}: --problem_type {SINGLE_LABEL} takes whole numbers or words."
        )
    words = {label for label in labels if isinstance(label, str)}
    if words and all(map(_LIST.fullmatch, words)):
        raise DataError(
            f"{where} holds lists as text, for example {min(words)!r}: a csv file has no lists, give json or parquet."
        )
    others = {word for word in words if not _NUMBER.fullmatch(word)}
    if others and others < words and all(word.strip().lower() in _NOTHING for word in others):
        raise DataError(
            f"{where} has the label {min(others)!r} among numbers: leave rows without a label, or with one that is "
            "not finite, out, or name the class otherwise."
        )


def model_label_ids(data: TaskData, label2id: dict[str, int] | None) -> list[int]:
    """The model's id of each of the data's labels, which may be some of the model's only.

    Labels are matched by name: exactly, or in either case where that is one to one. Where one side only has numbers
    (`LABEL_0`, or data with whole numbers as labels), the number is the id; words for all labels of a model without
    names are taken in the data's order.

    Raises:
        DataError: a label that the model does not know, or that could be several.
    """
    names = data.label_names
    if label2id is None:
        return list(range(len(names)))
    numbers = {str(number): number for number in label2id.values()}
    unnamed = label2id == {f"LABEL_{number}": number for number in range(len(label2id))}
    if not any(name in label2id for name in names):
        if (unnamed or not any(map(_is_whole_number, label2id))) and all(name in numbers for name in names):
            return [numbers[name] for name in names]
        if unnamed and len(names) == len(label2id):
            return list(range(len(names)))
    # A folded name counts where one of the model's names and one of the data's fold to it.
    known, ours = Counter(map(str.casefold, label2id)), Counter(map(str.casefold, names))
    folded = {name.casefold(): number for name, number in label2id.items() if known[name.casefold()] == 1}
    folded = {name: number for name, number in folded.items() if ours[name] == 1}
    ids = [label2id.get(name, folded.get(name.casefold())) for name in names]
    if None in ids:
        unknown = names[ids.index(None)]
        twins = [name for name in label2id if name.casefold() == unknown.casefold()]
        hint = f" ({unknown!r} differs from {' and '.join(map(repr, twins))} in case, others do too)" if twins else ""
        raise DataError(
            f"Column {data.label_column!r} has the label {unknown!r}, which the model does not know{hint}; it knows: "
            f"{', '.join(label2id)}. Give --ignore_mismatched_sizes to make the head anew, or relabel the data."
        )
    return ids
