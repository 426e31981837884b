"""Streaming: training rows are read when they are needed, evaluation rows are loaded into memory."""

import itertools
from collections.abc import Iterator

import datasets
import torch

from .._deprecated import moved_names


def hold_all_but_train(splits: dict, limits: dict[str, int | None]) -> dict:
    """Load all splits but `train` into memory, up to their limits; `train` remains a stream.

    Images are not decoded yet: `decode_image` decodes them later, and names corrupt ones.
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
    """A stream that starts again, in another order, when it ends, since `Trainer` trains one epoch of a stream.

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
            if empty:  # there are more workers than files, and this worker has none
                return


__getattr__ = moved_names(__name__)
