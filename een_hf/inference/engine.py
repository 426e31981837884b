"""`ExitEngine`: the examples of several batches that continue run the deeper stages together."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from ..models import EarlyExitMixin, ExitConfigurationError
from .programs import graphs_on, main_input, segments_of
from .runner import runs_graphs
from .slots import Slots, SlotsByShape, Step, send


class ExitEngine:
    """Runs examples through a model in such a way that the deeper stages get full batches too.

    Examples of several batches that continue wait before each stage and run together as soon as there are `batch_size`
    of them; of several full stages the deepest runs first. Between two steps fewer than `batch_size` examples wait
    before each stage, and one step adds at most `batch_size`. So the hidden states of at most
    (num_exits + 1) * batch_size examples are held at any time, plus one window of inputs. They stay where they are on
    the device (`Slots`).

    Args:
        model: an early-exit model. Its `config.exit_policy` decides where examples exit; without a policy every
            example runs to the last exit.
        batch_size: number of examples per step, at least 1. By static programs a deeper stage takes fewer, where a
            probe shows that more of them take no less time each.
        cuda_graphs: run static programs, which CUDA replays as graphs (default: on CUDA where `model.cuda_graphs` is
            true).

    Raises:
        ExitConfigurationError: `batch_size` is below 1.
    """

    def __init__(self, model: EarlyExitMixin, batch_size: int = 32, cuda_graphs: bool | None = False):
        if batch_size < 1:
            raise ExitConfigurationError(f"batch_size must be at least 1, not {batch_size}.")
        self.model, self.batch_size = model, batch_size
        self.policy = model.get_exit_policy()
        self._static = runs_graphs(model, cuda_graphs)
        self._graphs = graphs_on(model.device) if self._static else None
        stages = len(segments_of(model, self.policy))
        self._slots = SlotsByShape(partial(
            Slots, model, self.policy, batch_size, static=self._static, graphs=self._graphs,
            num_slots=batch_size * (stages + 1) if self._static else None,
        ))  # fmt: skip
        # A stage ends where examples can exit. Before each but the first wait pairs of slot and id, by shape.
        self._waiting: list[dict[tuple | None, deque[tuple[int, int]]]] = [{} for _ in range(stages)]
        self._running: deque[tuple[tuple | None, Slots, int, Step, list[int]]] = deque()

    @torch.no_grad()
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
        # What an earlier call that was not finished has left.
        self._running.clear()
        for waiting in self._waiting:
            waiting.clear()
        for slots in self._slots.values():
            slots.release_all()
        ahead = 0 if self._graphs is None else 1  # while a graph runs, the next is sent; its answers are read then
        for ids, inputs in batches:
            ids = ids.tolist()
            for start in range(0, len(ids), self.batch_size):
                part = slice(start, start + self.batch_size)
                self._start(ids[part], {n: v[part] if torch.is_tensor(v) else v for n, v in inputs.items()})
                yield from self._finish(keep=ahead)
                while (stage := self._deepest_full()) is not None:
                    self._step(stage)
                    yield from self._finish(keep=ahead)
        for stage in range(len(self._waiting)):
            while self.num_waiting(stage):
                self._step(stage)
            yield from self._finish()

    def num_waiting(self, stage: int) -> int:
        """How many examples wait before a stage.

        Args:
            stage: 0-based; a stage ends where examples can exit.

        Returns:
            number of examples.
        """
        return sum(map(len, self._waiting[stage].values()))

    @property
    def num_in_flight(self) -> int:
        """The number of examples that have started and not exited."""
        return self._slots.num_in_flight

    def _start(self, ids: list[int], inputs: dict) -> None:
        """Run the first stage."""
        model, main = self.model, main_input(inputs, self.model.main_input_name)
        shape = main.shape[1:] if model.main_input_name == "pixel_values" else None
        if shape is None:
            model.check_padding(inputs.get("attention_mask"), main.shape[:2])
        slots = self._slots[shape]
        self._running.append((shape, slots, 0, slots.start(inputs), ids))

    def _deepest_full(self) -> int | None:
        stages = reversed(range(1, len(self._waiting)))
        return next(
            (stage for stage in stages if self._waiting[stage] and self.num_waiting(stage) >= self._size(stage)), None
        )

    def _size(self, stage: int) -> int:
        """The number of examples of a step of those that wait."""
        if not self._static:
            return self.batch_size
        shape, waiting = next(iter(self._waiting[stage].items()))
        slots = self._slots[shape]
        return slots.fastest_rows(stage, int(slots.widths[waiting[0][0]]))

    def _step(self, stage: int) -> None:
        """Run a later stage on those that have waited longest."""
        shape, waiting = next(iter(self._waiting[stage].items()))
        taken = [waiting.popleft() for _ in range(min(self._size(stage), len(waiting)))]
        if not waiting:
            del self._waiting[stage][shape]
        places, ids = map(list, zip(*taken, strict=True))
        slots = self._slots[shape]
        self._running.append((shape, slots, stage, slots.run(stage, places), ids))

    def _finish(self, keep: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Wait for all steps that run, but the last so many, and yield what exits; the others wait."""
        while len(self._running) > keep:
            shape, slots, stage, step, ids = self._running.popleft()
            exits = step.exits()
            gone = [place for place, done in enumerate(exits) if done]
            if len(self._waiting) > 1:
                slots.release([step.slots[place] for place in gone])
            if len(gone) < len(ids):
                others = ((step.slots[place], ids[place]) for place, done in enumerate(exits) if not done)
                self._waiting[stage + 1].setdefault(shape, deque()).extend(others)
            if gone:
                whole = len(gone) == len(ids)
                logits = step.logits if whole else step.logits.index_select(0, send(gone, step.logits.device))
                yield torch.tensor([ids[place] for place in gone]), logits, step.exit_index
