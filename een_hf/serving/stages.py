"""The work of the engine's one thread: rows of many requests wait before each stage and run it together."""

import asyncio
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..inference.programs import Decisions, graphs_on, segments_of
from ..inference.rows import pad_rows
from ..inference.runner import runs_graphs
from ..inference.slots import Slots, SlotsByShape, Step
from ..models import EarlyExitMixin, ExitPolicy


if TYPE_CHECKING:
    from .auditing import Auditor


# A step costs about as much as so many more tokens in another one (one layer of MiniLM on a CPU: 0.8 ms, and 0.04 ms
# per token).
STEP_TOKENS = {"cpu": 20, "cuda": 256}
# Kinds of policies whose programs are kept.
MAX_KINDS = 4


class EngineObserver:
    """Base class of observers, which the engine tells what happens, for metrics. Its own methods do nothing.

    `refused` and `responded` are called on the event loop, the others in the worker's thread.
    """

    def stage_ran(self, exit_index: int, num_rows: int, waited: list[float]) -> None:
        """A stage has run.

        Args:
            exit_index: 0-based exit at the end of the stage.
            num_rows: number of rows that ran together.
            waited: seconds that each of them waited before the stage.
        """

    def answered(self, exit_index: int, seconds: float) -> None:
        """A row has been answered.

        Args:
            exit_index: its 0-based exit.
            seconds: time since its request arrived.
        """

    def dropped(self, num_rows: int) -> None:
        """Rows have been removed because their request was cancelled or has failed.

        Args:
            num_rows: number of rows.
        """

    def refused(self, num_rows: int) -> None:
        """A request has been refused because the queue was full.

        Args:
            num_rows: number of its rows.
        """

    def responded(self, status: int, seconds: float) -> None:
        """A server has answered a request.

        Args:
            status: HTTP status.
            seconds: time since the request arrived.
        """

    def audited(self, difference: float, alarm: bool) -> None:
        """An audited row has reached the last exit.

        Args:
            difference: how much the last exit's answer differs from the one that was given, between 0 and 1.
            alarm: whether the monitor has raised an alarm.
        """


@dataclass(eq=False, slots=True)
class Request:
    """One call of `AsyncExitEngine.predict`.

    Args:
        examples: as they were given; `None` once they have been read.
        policy: the exit policy of all its rows; `None`: no early exit.
        future: receives the answers.
        own_policy: whether the policy is the model's own; only that one is audited.
    """

    examples: list | None
    policy: ExitPolicy | None
    future: asyncio.Future
    own_policy: bool
    arrived: float = field(default_factory=time.perf_counter)
    rows: list["Row"] = field(default_factory=list)
    num_answered: int = 0

    @property
    def dropped(self) -> bool:
        """Whether the answers are no longer needed: the request was cancelled, has failed or is answered."""
        return self.future.done()


@dataclass(eq=False, slots=True)
class Row:
    """One example of a request.

    Args:
        request: the request that it belongs to.
        inputs: model inputs without a batch dimension; `None` once embedded.
        size: rows of equal size can run together: the length rounded up, or the shape of the image.
        length: number of tokens; 0 for images.
        masked: whether its own attention mask contains zeros.
    """

    request: Request
    inputs: dict | None
    size: Hashable
    length: int = 0
    masked: bool = False
    audited: bool = False
    waits_since: float = 0.0
    slot: int | None = None  # between two segments
    exit_index: int | None = None
    logits: torch.Tensor | None = None
    last_logits: torch.Tensor | None = None  # of an audited row

    @property
    def dropped(self) -> bool:
        """Whether it need not run. Audited rows always run: dropping the slow ones would bias the audit."""
        return self.request.dropped and not self.audited


class Queues:
    """Rows whose policies have the same criterion and cut the network into the same segments, and where they wait.

    Args:
        model: an early-exit model.
        policy: of the first of these rows.
        max_rows: rows per step.
        graphs: of static programs, see `Slots`; `None`: they run eagerly.
        static: whether programs run on rounded numbers of rows and tokens.
    """

    def __init__(self, model: EarlyExitMixin, policy: ExitPolicy | None, max_rows: int, static: bool, graphs):
        # Before each segment the rows of each size, in the order of their arrival.
        self.waiting: list[dict[Hashable, deque[Row]]] = [defaultdict(deque) for _ in segments_of(model, policy)]
        # So many may be in flight: each segment gets full steps.
        self.max_in_flight = max_rows * (len(self.waiting) + 1)
        self._slots = SlotsByShape(
            partial(Slots, model, policy, max_rows, static=static, graphs=graphs, num_slots=self.max_in_flight)
        )

    def slots(self, size: Hashable) -> Slots:
        """The slots of rows of this size."""
        return self._slots[_shape(size)]

    def has_room(self, size: Hashable) -> bool:
        """Whether a step of new rows fits."""
        slots = self._slots.get(_shape(size))
        return slots is None or slots.num_in_flight + slots.max_rows <= self.max_in_flight

    @property
    def num_in_flight(self) -> int:
        """Rows that have started and not exited."""
        return self._slots.num_in_flight

    def lists(self) -> Iterator[tuple[int, Hashable, deque[Row]]]:
        """(segment, size, rows) of each list; empty ones have been deleted."""
        for segment, by_size in enumerate(self.waiting):
            for size, waiting in by_size.items():
                yield segment, size, waiting


def _shape(size: Hashable) -> tuple | None:
    """Of images their shape; texts of all lengths share their slots."""
    return size if isinstance(size, tuple) else None


class StageWorker:
    """Runs rows through the segments, some of those that wait at a time, on one thread.

    A step takes the deepest list of rows that have started and that is full or has waited for `max_wait` seconds. If
    there is none, it takes the list of new rows whose first arrived first; if there are none, the deepest list. So
    rows of several requests meet before the deeper stages while there is other work, and no row waits while there is
    none. Texts of other lengths that wait at the same place join where they fill less padding than a step costs.

    Args:
        model: an early-exit model in eval mode.
        max_rows: rows per step.
        max_wait: seconds.
        observer: is told what happens.
        auditor: chooses rows that continue to the last exit; `None`: no audits.
        cuda_graphs: run static programs, which CUDA replays as graphs; `None`: on CUDA where `model.cuda_graphs` is
            true.
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        max_rows: int,
        max_wait: float,
        observer: EngineObserver,
        auditor: "Auditor | None" = None,
        cuda_graphs: bool | None = None,
    ):
        self.model, self.max_rows, self.max_wait, self.observer = model, max_rows, max_wait, observer
        self.auditor = auditor
        self._text = model.main_input_name == "input_ids"
        self._static = runs_graphs(model, cuda_graphs)
        self._graphs = graphs_on(model.device) if self._static else None
        self._step_tokens = STEP_TOKENS.get(model.device.type, STEP_TOKENS["cpu"])
        self._queues: OrderedDict[tuple, Queues] = OrderedDict()
        self._known: tuple[ExitPolicy | None, Queues] | None = None
        # Requests that were answered or have failed (with the error), and the number of rows that are finished.
        self.finished: list[tuple[Request, Exception | None]] = []
        self.num_through = 0

    def add(self, rows: list[Row]) -> None:
        """Let the rows of one request wait before the first segment."""
        if self.auditor is not None:
            self.auditor.choose(rows)
        now = time.perf_counter()
        waiting = self._queues_of(rows[0].request.policy).waiting[0]
        for row in rows:
            row.waits_since = now
            waiting[row.size].append(row)

    def num_waiting(self) -> int:
        """The number of rows that wait before any segment."""
        return sum(len(waiting) for queues in self._queues.values() for _, _, waiting in queues.lists())

    def num_in_flight(self) -> int:
        """The number of rows that have started and not exited."""
        return sum(queues.num_in_flight for queues in self._queues.values())

    def step(self) -> bool:
        """Run one segment on rows that wait; `False` if none waits."""
        chosen = self._choose(time.perf_counter())
        if chosen is None:
            return False
        queues, segment, size = chosen
        rows = self._take(queues, segment, size, self.max_rows)
        if self._text:
            self._join(queues, segment, size, rows)
        if rows:
            self._run(queues, segment, rows)
        return True

    def _queues_of(self, policy: ExitPolicy | None) -> Queues:
        if self._known is None or self._known[0] is not policy:
            kind = Decisions.kind(self.model, policy)
            if kind not in self._queues:
                # Requests may have policies of any kind: those that were not used for longest are forgotten.
                idle = [key for key, queues in self._queues.items() if not any(queues.waiting)]
                for key in idle[: max(0, len(self._queues) + 1 - MAX_KINDS)]:
                    del self._queues[key]
                self._queues[kind] = Queues(self.model, policy, self.max_rows, self._static, self._graphs)
            self._queues.move_to_end(kind)
            self._known = policy, self._queues[kind]
        return self._known[1]

    def _choose(self, now: float) -> tuple[Queues, int, Hashable] | None:
        due = new = deepest = None
        for queues in self._queues.values():
            for segment, size, waiting in queues.lists():
                here, oldest = (queues, segment, size), waiting[0]
                if segment == 0:
                    if (new is None or oldest.request.arrived < new[0]) and queues.has_room(size):
                        new = oldest.request.arrived, here
                    continue
                depth = queues.slots(size).exits[segment]
                if deepest is None or depth > deepest[0]:
                    deepest = depth, here
                if len(waiting) >= self.max_rows or now - oldest.waits_since >= self.max_wait:
                    if due is None or depth > due[0]:
                        due = depth, here
        chosen = due or new or deepest
        return chosen and chosen[1]

    def _take(self, queues: Queues, segment: int, size: Hashable, count: int) -> list[Row]:
        """Up to `count` rows of a list, those that have waited longest; rows of cancelled requests are dropped."""
        waiting, taken = queues.waiting[segment][size], []
        while waiting and len(taken) < count:
            row = waiting.popleft()
            if row.dropped:
                self._release(queues, row)
                self.drop(1)
            else:
                taken.append(row)
        if not waiting:
            del queues.waiting[segment][size]
        return taken

    def _join(self, queues: Queues, segment: int, size: int, rows: list[Row]) -> None:
        """Add whole lists of texts of other lengths, the nearest first, while that is cheaper than their own step."""
        lists = queues.waiting[segment]
        for other in sorted(lists.keys() - {size}, key=lambda other: abs(other - size)):
            together = [row.length for row in (*rows, *lists[other])]
            more = max(together) * len(together) - sum(together)
            before = max((row.length for row in rows), default=0) * len(rows) - sum(row.length for row in rows)
            if len(together) > self.max_rows or more - before > self._step_tokens:
                return
            rows += self._take(queues, segment, other, self.max_rows - len(rows))

    def _release(self, queues: Queues, row: Row) -> None:
        if row.slot is not None:
            queues.slots(row.size).release([row.slot])
            row.slot = None

    def drop(self, num_rows: int) -> None:
        """Count rows whose answers are no longer needed as finished."""
        self.num_through += num_rows
        self.observer.dropped(num_rows)

    def _recover(self, queues: Queues, segment: int, rows: list[Row], error: Exception) -> None:
        """After a failed step run its rows one by one, as only the one at fault may fail.

        Rows that a later segment may have changed cannot run through it again: they fail together.
        """
        if segment == 0:
            for row in rows:
                self._release(queues, row)
        if len(rows) > 1 and (segment == 0 or not queues.slots(rows[0].size).changed):
            for row in rows:
                self._run(queues, segment, [row])
            return
        for row in rows:
            row.audited = False
            self._release(queues, row)
            if row.logits is None:
                self.num_through += 1
                self.finished.append((row.request, error))

    def _run(self, queues: Queues, segment: int, rows: list[Row]) -> None:
        now, last = time.perf_counter(), segment + 1 == len(queues.waiting)
        try:
            step = self._launch(queues, segment, rows)
            if segment == 0 and not last:
                for row, slot in zip(rows, step.slots, strict=True):
                    row.slot = slot
            exits = step.exits()
            answers = step.logits.detach().float().cpu() if any(exits) else None
        except Exception as error:
            self._recover(queues, segment, rows, error)
            return
        if segment == 0:
            for row in rows:
                row.inputs = None
        self.observer.stage_ran(step.exit_index, len(rows), [now - row.waits_since for row in rows])
        now = time.perf_counter()
        for place, row in enumerate(rows):
            if exits[place] and row.logits is None:
                self._answer(row, step.exit_index, answers[place], now)
            if last:
                row.last_logits = answers[place]
            if not last and (row.logits is None or row.audited):
                row.waits_since = now
                queues.waiting[segment + 1][row.size].append(row)
            else:
                self._release(queues, row)
        if last and self.auditor is not None:
            for difference in self.auditor.settle():
                self.observer.audited(difference, self.auditor.monitor.alarm)

    def _answer(self, row: Row, exit_index: int, logits: torch.Tensor, now: float) -> None:
        row.exit_index, row.logits = exit_index, logits
        self.observer.answered(exit_index, now - row.request.arrived)
        self.num_through += 1
        row.request.num_answered += 1
        if row.request.num_answered == len(row.request.rows):
            self.finished.append((row.request, None))

    def _launch(self, queues: Queues, segment: int, rows: list[Row]) -> Step:
        slots = queues.slots(rows[0].size)
        if segment:
            return slots.run(segment, [row.slot for row in rows])
        inputs = pad_rows([row.inputs for row in rows], self.model.config)
        lengths, masked = [row.length for row in rows], [row.masked for row in rows]
        return slots.start(inputs, lengths, masked, [row.request.policy for row in rows])
