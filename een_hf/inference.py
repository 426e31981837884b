"""Dynamic prediction over whole data sets and streams, with the deeper stages kept full."""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .models import EarlyExitMixin


@dataclass
class ExitPredictions:
    """Answers in input order.

    Args:
        logits: (num_rows, num_labels), float32, each row's own exit's.
        exit_index: (num_rows,), int64, 0-based exit that each row took; the last exit's without a policy.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor


@dataclass
class _Rows:
    """Rows on their way through the network, all tensors row first."""

    ids: torch.Tensor  # (rows,) position in the input
    hidden: torch.Tensor  # (rows, length, hidden_size)
    attention_mask: torch.Tensor | None  # (rows, length)
    logits: torch.Tensor | None  # (rows, num_labels), what the exit before predicts
    state: tuple[torch.Tensor, ...]  # what the criterion remembers

    def __len__(self) -> int:
        return len(self.ids)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "_Rows":
        """The same rows with `function` applied to each tensor."""
        optional = (self.attention_mask, self.logits)
        mask, logits = (None if tensor is None else function(tensor) for tensor in optional)
        return _Rows(function(self.ids), function(self.hidden), mask, logits, tuple(map(function, self.state)))

    def trim(self) -> "_Rows":
        """Cut the trailing columns that no row uses."""
        if self.attention_mask is None:
            return self
        used = self.attention_mask != 0
        # A row of padding only attends to all of it.
        used = used | ~used.any(1, keepdim=True)
        width = int(used.any(0).nonzero().max()) + 1
        return _Rows(self.ids, self.hidden[:, :width], self.attention_mask[:, :width], self.logits, self.state)

    def with_mask(self) -> "_Rows":
        """The same rows, with a mask of ones where they had none."""
        if self.attention_mask is not None:
            return self
        mask = torch.ones(self.hidden.shape[:2], dtype=torch.int64, device=self.hidden.device)
        return _Rows(self.ids, self.hidden, mask, self.logits, self.state)

    @staticmethod
    def join(parts: list["_Rows"]) -> "_Rows":
        """Stack rows of different length, the shorter padded on the right."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.hidden.shape[1] for part in parts)
        # No mask means no padding: that must be said once rows are padded, or stand beside rows that are.
        if any(part.attention_mask is not None or part.hidden.shape[1] < width for part in parts):
            parts = [part.with_mask() for part in parts]

        def stack(name: str, padding: Callable[[int], tuple] | None = None):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                return None
            if padding is not None:
                tensors = [F.pad(tensor, padding(width - tensor.shape[1])) for tensor in tensors]
            return torch.cat(tensors)

        return _Rows(
            ids=stack("ids"),
            hidden=stack("hidden", lambda missing: (0, 0, 0, missing)),
            attention_mask=stack("attention_mask", lambda missing: (0, missing)),
            logits=stack("logits"),
            state=tuple(torch.cat(tensors) for tensors in zip(*(part.state for part in parts), strict=True)),
        )


class ExitEngine:
    """Runs rows through a model whose deeper stages see full batches.

    Survivors of several batches wait before each stage and run together once `batch_size` of them have gathered, the
    deepest full stage first. Fewer than `batch_size` rows wait before each stage between two steps, and one step adds
    at most `batch_size`, before the first stage or the next: at most (num_exits + 1) * batch_size rows of hidden
    states are held at any time, plus one window of inputs.

    Args:
        model: an early-exit model; its `config.exit_policy` decides who leaves, without one every row runs through.
        batch_size: rows per step.
    """

    def __init__(self, model: EarlyExitMixin, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self.model, self.batch_size = model, batch_size
        self.policy = model.get_exit_policy()
        self.waiting: list[list[_Rows]] = [[] for _ in range(model.num_exits)]

    def run(self, batches: Iterable[tuple[torch.Tensor, dict]]) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield (ids, logits, exit index) of rows as they leave, from batches of (ids, model inputs)."""
        for ids, inputs in batches:
            hidden, attention_mask = self.model.embed(**inputs)
            self.waiting[0].append(_Rows(ids.to(hidden.device), hidden, attention_mask, None, ()))
            while (stage := self._deepest_full()) is not None:
                yield from self._step(stage)
        for stage in range(self.model.num_exits):
            while self.waiting[stage]:
                yield from self._step(stage)

    def num_waiting(self, stage: int) -> int:
        """Rows that wait before this 0-based stage."""
        return sum(map(len, self.waiting[stage]))

    def _deepest_full(self) -> int | None:
        stages = reversed(range(self.model.num_exits))
        return next((stage for stage in stages if self.num_waiting(stage) >= self.batch_size), None)

    def _take(self, stage: int) -> _Rows:
        """Up to `batch_size` of the rows that wait before a stage, in the order they came: longest texts first."""
        parts, room = [], self.batch_size
        queue = self.waiting[stage]
        while queue and room:
            part = queue.pop(0)
            if len(part) > room:
                queue.insert(0, part.map(operator.itemgetter(slice(room, None))))
                part = part.map(operator.itemgetter(slice(room)))
            parts.append(part)
            room -= len(part)
        return _Rows.join(parts).trim()

    def _step(self, stage: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        model, rows = self.model, self._take(stage)
        mask = model.layer_mask(rows.hidden, rows.attention_mask)
        pooled_by = None if mask is None else rows.attention_mask
        hidden, logits = model.run_stage(stage, rows.hidden, pooled_by, mask, rows.logits)
        if stage == model.num_exits - 1:
            yield rows.ids, logits, stage
            return
        rows = _Rows(rows.ids, hidden, rows.attention_mask, logits, rows.state)
        if self.policy is None:
            self.waiting[stage + 1].append(rows)
            return
        leaves, rows.state = self.policy.decide(stage, logits, rows.state)
        gone = leaves.nonzero().squeeze(1)
        if len(gone):
            yield rows.ids[gone], logits[gone], stage
        if len(gone) < len(rows):
            stay = (~leaves).nonzero().squeeze(1)
            self.waiting[stage + 1].append(rows.map(lambda tensor: tensor[stay]) if len(gone) else rows)


@torch.inference_mode()
def predict(
    model: EarlyExitMixin,
    dataset: Iterable[dict],
    batch_size: int = 32,
    *,
    collator: Callable[[list[dict]], dict] | None = None,
    window: int | None = None,
    progress: bool | None = None,
    total: int | None = None,
) -> ExitPredictions:
    """Predict a data set or stream with early exits, in input order.

    Args:
        model: an early-exit model.
        dataset: rows of model inputs, with or without labels; anything iterable, a `datasets.Dataset` or a generator.
        batch_size: rows per step.
        collator: makes model inputs out of a list of rows. Default: text is padded on the right, images are stacked.
        window: texts that are read and sorted by length at a time. Default: the whole data set, or 64 batches of a
            stream. Images are read by batches.
        progress: show a progress bar. Default: from 1,000 rows on, or for a stream.
        total: number of rows, where `dataset` does not know it.
    """
    was_training = model.training
    total = len(dataset) if hasattr(dataset, "__len__") else total
    collator = collator or (lambda rows: pad_rows(rows, model.config))
    window = window or (64 * batch_size if total is None else max(total, 1))
    engine = ExitEngine(model, batch_size)
    answers = []
    progress = (total is None or total >= 1000) if progress is None else progress
    model.eval()
    try:
        with tqdm(total=total, unit="row", disable=not progress) as bar:
            for ids, logits, exit_index in engine.run(_batches(dataset, batch_size, window, collator, model.device)):
                answers.append((ids.cpu(), logits.float().cpu(), torch.full((len(ids),), exit_index)))
                bar.update(len(ids))
    finally:
        model.train(was_training)
    if not answers:
        return ExitPredictions(torch.empty(0, model.config.num_labels), torch.empty(0, dtype=torch.int64))
    ids, logits, exit_index = (torch.cat(tensors) for tensors in zip(*answers, strict=True))
    order = ids.argsort()
    return ExitPredictions(logits[order], exit_index[order])


def _batches(dataset, batch_size, window, collator, device) -> Iterator[tuple[torch.Tensor, dict]]:
    """(ids, inputs) by batches, each window of texts from long to short."""
    rows, start = iter(dataset), 0
    first_row = next(rows, None)
    rows = chain([first_row], rows) if first_row is not None else rows
    window = window if "input_ids" in (first_row or {}) else batch_size
    while chunk := list(islice(rows, window)):
        order = sorted(range(len(chunk)), key=lambda i: -len(chunk[i].get("input_ids", ())))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            inputs = collator([chunk[i] for i in chosen])
            inputs = {
                name: value.to(device)
                for name, value in inputs.items()
                if torch.is_tensor(value) and not name.startswith("label")
            }
            yield torch.tensor(chosen) + start, inputs
        start += len(chunk)


def pad_rows(rows: list[dict], config) -> dict[str, torch.Tensor]:
    """Stack rows, their labels left out; texts of different length are padded on the right and masked."""
    names = [name for name in rows[0] if not name.startswith("label")]
    columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in names}
    if "input_ids" in columns and "attention_mask" not in columns:
        columns["attention_mask"] = [torch.ones_like(tokens) for tokens in columns["input_ids"]]
    padding = {"input_ids": getattr(config, "pad_token_id", 0) or 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding.get(name, 0))
        if "input_ids" in columns
        else torch.stack(values)
        for name, values in columns.items()
    }
