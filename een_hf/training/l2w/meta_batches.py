"""The meta batches of `--meta_batch_size`: training rows, in an order of their own."""

import copy
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from accelerate import skip_first_batches
from torch.utils.data import IterableDataset, Sampler

from ...models import ExitConfigurationError
from ..callbacks import set_epoch


if TYPE_CHECKING:
    from .trainer import MetaWeightedExitTrainer


class MetaSampler(Sampler[int]):
    """The rows of one pass, in a random order that depends on seed and pass only.

    Args:
        num_rows: number of training rows.
        batch_size: of all processes together; the rows of an incomplete last batch are left out.
        seed: of the order.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self.num_rows, self.length = num_rows, num_rows // batch_size * batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        # By torch's generator the same seed would give the order of the training batches.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_rows)
        return iter(order[: self.length].tolist())


def meta_batches(trainer: "MetaWeightedExitTrainer", number: int) -> Iterator[dict]:
    """The meta batches of a training, without end, by the trainer's own data loader; each process gets other rows.

    Args:
        trainer: the trainer.
        number: how many look-aheads came before.

    Yields:
        model inputs and labels, each (meta_batch_size, ...).
    """
    size, seed = trainer.scheme_args.meta_batch_size, trainer.args.seed
    of_all = size * trainer.args.world_size
    rows = copy.copy(trainer.train_dataset)  # whose epoch is the pass over these batches
    loader = trainer._get_dataloader(
        rows, "Meta", size, lambda rows: MetaSampler(len(rows), of_all, seed), is_training=True
    )
    first_pass, done = divmod(number, len(loader))
    for epoch in count(first_pass):
        set_epoch(loader, epoch)
        yield from skip_first_batches(loader, done) if done else loader
        done = 0


def check_meta_batch_size(trainer: "MetaWeightedExitTrainer") -> None:
    """Raise an error for training rows of which no meta batch can be drawn."""
    size, rows = trainer.scheme_args.meta_batch_size, trainer.train_dataset
    if size is None or rows is None:
        return
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        raise ExitConfigurationError(
            "--meta_batch_size draws training rows in another order, which a stream does not allow: leave it out, so "
            "that each batch is divided into halves, or leave out --streaming."
        )
    processes = trainer.args.world_size
    if size * processes > len(rows):
        raise ExitConfigurationError(
            f"--meta_batch_size {size} is too large for {len(rows)} training rows in {processes} process(es): give "
            f"at most {len(rows) // processes}."
        )
