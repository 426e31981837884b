"""The engine: survivors of several batches share the deeper stages."""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..models import EarlyExitMixin
from ..models.stages import Examples


class ExitEngine:
    """Runs examples through a model whose deeper stages see full batches.

    Survivors of several batches wait before each stage and run together once `batch_size` of them have gathered, the
    deepest full stage first. Fewer than `batch_size` examples wait before each stage between two steps, and one step
    adds at most `batch_size`, before the first stage or the next: at most (num_exits + 1) * batch_size examples'
    hidden states are held at any time, plus one window of inputs.

    Args:
        model: an early-exit model; its `config.exit_policy` decides who exits, without one every example runs through.
        batch_size: examples per step.
    """

    def __init__(self, model: EarlyExitMixin, batch_size: int = 32):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
        self.model, self.batch_size = model, batch_size
        self.policy = model.get_exit_policy()
        # The exits that are evaluated; a stage runs from one to the next.
        self.exits = model.evaluated_exits(self.policy)
        self.waiting: list[list[Examples]] = [[] for _ in self.exits]

    def run(self, batches: Iterable[tuple[torch.Tensor, dict]]) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield (ids, logits, exit index) of examples as they exit, from batches of (ids, model inputs)."""
        for ids, inputs in batches:
            examples = self.model.embed(**inputs)
            self.model.check_mask(examples.attention_mask, True, examples.hidden.shape[:2])
            self.model.check_padding(examples.attention_mask)
            self.waiting[0].append(replace(examples, ids=ids.to(examples.hidden.device)))
            while (stage := self._deepest_full()) is not None:
                yield from self._step(stage)
        for stage in range(len(self.exits)):
            while self.waiting[stage]:
                yield from self._step(stage)

    def num_waiting(self, stage: int) -> int:
        """Examples that wait before this stage, 0-based among the exits that are evaluated."""
        return sum(map(len, self.waiting[stage]))

    def _deepest_full(self) -> int | None:
        stages = reversed(range(len(self.exits)))
        return next((stage for stage in stages if self.num_waiting(stage) >= self.batch_size), None)

    def _take(self, stage: int) -> Examples:
        """Up to `batch_size` of those that wait before a stage, in the order they came: longest texts first.

        Images of another size go by themselves: nothing masks what would have to be filled up.
        """
        parts, room = [], self.batch_size
        queue, text = self.waiting[stage], self.model.main_input_name == "input_ids"
        while queue and room and (text or not parts or _shapes(queue[0]) == _shapes(parts[0])):
            part = queue.pop(0)
            if len(part) > room:
                queue.insert(0, part.map(operator.itemgetter(slice(room, None))))
                part = part.map(operator.itemgetter(slice(room)))
            parts.append(part)
            room -= len(part)
        return Examples.join(parts).trim()

    def _step(self, stage: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        model, examples, exit_index = self.model, self._take(stage), self.exits[stage]
        after = self.exits[stage - 1] if stage else -1
        hidden, logits = model.run_stage(exit_index, examples, model.make_context(examples), examples.logits, after)
        if exit_index == model.num_exits - 1:
            yield examples.ids, logits, exit_index
            return
        examples = replace(examples, hidden=hidden, logits=logits)
        if self.policy is None:
            self.waiting[stage + 1].append(examples)
            return
        exits, examples.state = self.policy.decide(exit_index, logits, examples.state)
        gone = exits.nonzero().squeeze(1)
        if len(gone):
            yield examples.ids[gone], logits[gone], exit_index
        if len(gone) < len(examples):
            left = (~exits).nonzero().squeeze(1)
            self.waiting[stage + 1].append(examples.select(left) if len(gone) else examples)


def _shapes(examples: Examples) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in examples.tensors()]
