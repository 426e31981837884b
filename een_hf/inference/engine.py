"""`ExitEngine`: the examples of several batches that continue run the deeper stages together."""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ..models import EarlyExitMixin
from ..models.stages import Examples


class ExitEngine:
    """Runs examples through a model in such a way that the deeper stages get full batches too.

    Examples of several batches that continue wait before each stage and run together as soon as there are `batch_size`
    of them; of several full stages the deepest runs first. Between two steps fewer than `batch_size` examples wait
    before each stage, and one step adds at most `batch_size`. So the hidden states of at most
    (num_exits + 1) * batch_size examples are held at any time, plus one window of inputs.

    Args:
        model: an early-exit model. Its `config.exit_policy` decides where examples exit; without a policy every
            example runs to the last exit.
        batch_size: number of examples per step, at least 1.

    Raises:
        ValueError: `batch_size` is below 1.
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
        """Answer batches of examples.

        Args:
            batches: pairs of ids (batch,), int64, and model inputs, each (batch, ...).

        Yields:
            ids (n,), logits (n, num_labels) and 0-based exit of n examples, as soon as they exit; not in the order of
            the input.

        Raises:
            ExitConfigurationError: a mask that is not 2-D, or padding on the left that the model cannot take.
        """
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
        """How many examples wait before a stage.

        Args:
            stage: 0-based, among the exits that are evaluated.

        Returns:
            number of examples.
        """
        return sum(map(len, self.waiting[stage]))

    def _deepest_full(self) -> int | None:
        stages = reversed(range(len(self.exits)))
        return next((stage for stage in stages if self.num_waiting(stage) >= self.batch_size), None)

    def _take(self, stage: int) -> Examples:
        """Up to `batch_size` of the examples that wait before a stage, first come, first served.

        Images of different sizes never run together, since padding of an image cannot be masked.
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
