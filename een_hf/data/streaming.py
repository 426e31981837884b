"""Training rows that are read as they are needed; evaluation rows are held as always."""

import itertools
from collections.abc import Iterator

import datasets
import torch

from .._moved import moved_names


def hold_all_but_train(splits: dict, limits: dict[str, int | None]) -> dict:
    """The splits with all but `train` read into memory, up to their limits; `train` stays a stream.

    No image is decoded here: `decode_image` does that, and names those that are corrupt.
    """
    held = {}
    for split, rows in splits.items():
        stream = rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows
        if stream.features is None:
            stream = stream._resolve_features()
        features = stream.features
        for column in [name for name, feature in features.items() if isinstance(feature, datasets.Image)]:
            stream = stream.cast_column(column, datasets.Image(decode=False))
        limit = limits.get(split.split("_")[0])
        stream = stream if limit is None else stream.take(limit)
        held[split] = stream
        if split != "train":
            held[split] = datasets.Dataset.from_list(list(stream), features=features)
    return held


class EndlessStream(torch.utils.data.IterableDataset):
    """A stream that starts over, in another order, when it ends: the one epoch that `Trainer` knows of a stream.

    This lets an interrupted run resume at the right position of the stream.
    """

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:  # more workers than files: this one has none
                return


__getattr__ = moved_names(__name__, {"ImageStream": "een_hf.data.image_rows"})
