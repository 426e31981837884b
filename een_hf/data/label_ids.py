"""The ids of labels: by name or number, in the data and in a model."""

import re
from collections import Counter
from collections.abc import Sequence

from .task import DataError, TaskData


def label_index(names: Sequence[str]) -> dict[str | int, int]:
    """The id of each label, by its name and by its number, which is its name where all names are numbers."""
    index = {name: number for number, name in enumerate(names)}
    if all(map(_is_whole_number, names)):
        return index | {int(name): number for name, number in index.items()}
    return index | {number: number for number in range(len(names))}


def _is_whole_number(name: str) -> bool:
    return re.fullmatch(r"-?\d+", name, re.ASCII) is not None and name == str(int(name))


def model_label_ids(data: TaskData, label2id: dict[str, int] | None) -> list[int]:
    """The model's id of each of the data's labels, which may be some of the model's only.

    Labels are matched by name: exactly, or in either case where that is one to one. Where one side only has numbers
    (`LABEL_0`, or data with whole numbers as labels), the number is the id; names for all labels of a model without
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
            f"{', '.join(label2id)}. Give --ignore_mismatched_sizes to start with a new head, or relabel the data."
        )
    return ids
