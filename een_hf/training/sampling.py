"""The choice of the rows of a batch, and the numbers of the rows in the current batch."""

from collections.abc import Sequence
from itertools import islice

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..models import ExitConfigurationError
from .callbacks import samplers_of


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler, whose draws depend only on seed and epoch, so that resumed runs see the same batches."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def read_column(rows, names: Sequence[str]) -> tuple[str, Sequence] | None:
    """The first of these columns that rows have, and its values; `None` without one, or if rows are read one by one.

    Args:
        rows: with columns, as a `datasets.Dataset`, or a list of dicts.
        names: names of columns.
    """
    columns = getattr(rows, "column_names", None)
    if columns is None and isinstance(rows, list | tuple) and rows:
        columns = rows[0]
    name = next((name for name in names if name in (columns or ())), None)
    if name is None or not hasattr(rows, "__len__"):
        return None
    return name, rows[name] if hasattr(rows, "column_names") else [row[name] for row in rows]


class SamplingMixin:
    """The part of `EarlyExitTrainer` that chooses the rows of batches."""

    def _get_train_sampler(self, train_dataset=None):
        """As in `Trainer`; with `group_by_length`, batches have the same rows for any number of processes.

        Raises:
            ExitConfigurationError: the strategy needs lengths, which are not known without reading all rows.
        """
        rows, strategy = self.train_dataset, self.args.train_sampling_strategy
        if strategy not in ("group_by_length", "batch_rebalance") or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        found = read_column(rows, (self.args.length_column_name, "input_ids"))
        if found is None:
            raise ExitConfigurationError(
                f"--train_sampling_strategy {strategy} needs the length of each row before training: a column "
                f"`input_ids` or `{self.args.length_column_name}` (--length_column_name) of a datasets.Dataset, or a "
                "list. For other rows use `random`."
            )
        if strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        name, values = found
        lengths = list(values) if name == self.args.length_column_name else [len(tokens) for tokens in values]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthGroupedSampler(step, lengths, seed)

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """As in `Trainer`, but `--dataloader_drop_last` is for training: evaluation reads every row."""
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    def _get_eval_sampler(self, eval_dataset):
        """Rows in their order, since predictions are matched with them by position."""
        ordered = self.args.world_size <= 1 and hasattr(eval_dataset, "__len__")
        return torch.utils.data.SequentialSampler(eval_dataset) if ordered else None

    def _rows_of_batch(self) -> list[int] | None:
        """The row of each example of the current micro-batch; `None` for a stream, or an order without a seed."""
        loader = self.callback_handler.train_dataloader
        if loader is None or not hasattr(self.train_dataset, "__len__"):
            return None
        samplers = list(samplers_of(loader))
        if isinstance(samplers[-1], RandomSampler) and not isinstance(samplers[-1], SeedableRandomSampler):
            return None
        number = round(self.state.epoch % 1 * len(loader)) + self._place[1]
        return next(islice(samplers[0], number, None), None)
