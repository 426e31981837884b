"""Training rows that are read as they are needed; evaluation rows are held as always."""

import copy
import itertools
from collections.abc import Callable, Iterator

import datasets
import torch

from .images import decode_image, seeded, warn_of_skipped
from .task import DataError


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

    Only so does it find the place again from which an interrupted run goes on.
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


class ImageStream(torch.utils.data.IterableDataset):
    """`ImageRows` for a stream; random transforms draw by seed, epoch, worker and position.

    Args:
        rows: stream with undecoded images in `image_column`.
        image_column: of the images.
        label_column: of class ids or numbers.
        label_ids: the model's id of each class id, or `None`.
        transform: PIL image to tensor.
        skip_corrupt: leave out images that cannot be decoded, instead of raising DataError; each pass ends with a
            warning that counts them, in each worker.
        where: what the stream is called in that warning.
    """

    def __init__(
        self,
        rows,
        image_column: str,
        label_column: str,
        label_ids,
        transform: Callable,
        skip_corrupt: bool,
        where: str,
    ):
        self.rows, self.image_column, self.label_column, self.label_ids = rows, image_column, label_column, label_ids
        self.transform, self.skip_corrupt, self.where, self.seed = transform, skip_corrupt, where, None
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def augmented(self, transform: Callable, seed: int) -> "ImageStream":
        """The same rows under a random transform."""
        other = copy.copy(self)
        other.transform, other.seed = transform, seed
        return other

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        place = 0 if worker is None else worker.id
        where = self.where if worker is None else f"{self.where}, worker {place + 1} of {worker.num_workers}"
        num_read, num_broken, first = 0, 0, ""
        try:
            for position, row in enumerate(self.rows):
                num_read += 1
                image, problem = decode_image(row[self.image_column])
                if problem:
                    name = row[self.image_column]["path"] or f"row {position} of the stream"
                    if not self.skip_corrupt:
                        raise DataError(
                            f"The image {name} is corrupt ({problem}): mend or remove it, or give --skip_corrupt."
                        )
                    num_broken, first = num_broken + 1, first or name
                    continue
                label = row[self.label_column]
                found = {"labels": label if self.label_ids is None else self.label_ids[label]}
                if self.seed is None:
                    yield found | {"pixel_values": self.transform(image)}
                    continue
                draw = (self.seed, int(self.epoch), place, position)
                with seeded(draw):
                    pixels = self.transform(image)
                yield found | {"pixel_values": pixels, "draw": draw}
        finally:  # the end of the pass, or of a run that stops within it
            if num_broken:
                warn_of_skipped(where, num_broken, num_read, first)
