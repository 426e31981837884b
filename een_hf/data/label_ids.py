"""The ids of labels, by name or by number, in the data and in a model."""

import re
from collections import Counter
from collections.abc import Sequence

from .task import DataError, TaskData


def label_index(names: Sequence[str]) -> dict[str | int, int]:
    """The id of each label, by its name and by its number. If all names are numbers, the number is the name."""
    index = {name: number for number, name in enumerate(names)}
    if all(map(_is_whole_number, names)):
        return index | {int(name): number for name, number in index.items()}
    return index | {number: number for number in range(len(names))}


def _is_whole_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None and name == str(int(name))


def model_label_ids(data: TaskData, label2id: dict[str, int] | None) -> list[int]:
    """The model's id of each label of the data, which need not have all labels of the model.

    Labels are matched by name: exactly, or regardless of case if the match is one to one. If one side has only numbers
    (`LABEL_0`, or whole numbers as labels), the number is the id. If the model has no names and as many labels as the
    data, the ids are those of the data.

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
    # Without case, a name is used only if exactly one name of the model and one of the data are equal to it.
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
            f"{', '.join(label2id)}. Give --ignore_mismatched_sizes to start with a new head, or relabel the data."
        )
    return ids
