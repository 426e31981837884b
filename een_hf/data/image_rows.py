"""Images as rows of model inputs, in memory or streamed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from .decoding import decode_image, image_name, warn_of_skipped
from .task import DataError
from .transforms import seeded


class ImageRows(torch.utils.data.Dataset):
    """Labelled images as rows of `pixel_values` (channels, height, width) and `labels`.

    Args:
        rows: data set with images in `image_column`.
        image_column: column of the images, which are decoded on access by `decode_image`.
        labels: class ids or numbers, (num_rows,); `None` without labels.
        transform: from a PIL image to a tensor.
        seed: seed of a random `transform`, whose draws depend only on seed, epoch and row, so that the number of
            workers and resuming do not change them. `None`: the transform is not random.
    """

    def __init__(self, rows, image_column: str, labels, transform: Callable, seed: int | None = None):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.transform, self.seed = image_column, transform, seed
        self.labels = None if labels is None else np.asarray(labels)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see its changes

    @property
    def column_names(self) -> list[str]:
        return ["pixel_values"] + ([] if self.labels is None else ["labels"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> dict[str, Any] | np.ndarray:
        if index == "labels":
            return self.labels
        encoded = self.rows[int(index)][self.image_column]
        image, problem = decode_image(encoded)
        if problem:
            raise DataError(f"The image {image_name(encoded, f'of row {index}')} is corrupt ({problem}).")
        row = {} if self.labels is None else {"labels": self.labels[index].item()}
        if self.seed is None:
            return row | {"pixel_values": self.transform(image)}
        draw = (self.seed, int(self.epoch), int(index))
        with seeded(draw):
            return row | {"pixel_values": self.transform(image), "draw": draw}

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def select(self, indices: Sequence[int]) -> "ImageRows":
        """These rows only."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageRows(self.rows.select(indices), self.image_column, labels, self.transform, self.seed)

    def __copy__(self) -> "ImageRows":
        """The same rows, with an epoch of their own."""
        return self.augmented(self.transform, self.seed)

    def augmented(self, transform: Callable, seed: int) -> "ImageRows":
        """The same rows under a random transform."""
        return ImageRows(self.rows, self.image_column, self.labels, transform, seed)


class ImageStream(torch.utils.data.IterableDataset):
    """`ImageRows` for a stream; random transforms draw by seed, epoch, worker and position.

    Args:
        rows: stream with undecoded images in `image_column`.
        image_column: column of the images.
        label_column: column of class ids or numbers.
        label_ids: the model's id of each class id, or `None`.
        transform: from a PIL image to a tensor.
        skip_corrupt: skip images that cannot be decoded, instead of raising DataError; each pass ends with a warning
            that counts them, in each worker.
        where: name of the stream in this warning.
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
                    name = image_name(row[self.image_column], f"row {position} of the stream")
                    if not self.skip_corrupt:
                        raise DataError(
                            f"The image {name} is corrupt ({problem}): repair or remove it, or give --skip_corrupt."
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
