"""The work of the engine's one thread: rows of many requests wait before each stage and run it together."""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..inference.programs import Decisions
from ..inference.rows import pad_rows
from ..models import EarlyExitMixin, ExitPolicy
from ..models.policies import decide
from ..models.stages import Examples


if TYPE_CHECKING:
    from .auditing import Auditor


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
    exit_index: int | None = None
    logits: torch.Tensor | None = None
    last_logits: torch.Tensor | None = None  # of an audited row

    @property
    def dropped(self) -> bool:
        """Whether it need not run. Audited rows always run: dropping the slow ones would bias the audit."""
        return self.request.dropped and not self.audited


@dataclass(eq=False, slots=True)
class Part:
    """Rows that ran together, and their tensors after the stages so far (`None` before the first)."""

    rows: list[Row]
    examples: Examples | None = None

    def select(self, places: list[int]) -> "Part":
        if len(places) == len(self.rows):
            return self
        examples = self.examples
        if examples is not None:
            examples = examples.select(torch.tensor(places, device=examples.hidden.device))
        return Part([self.rows[place] for place in places], examples)

    def singles(self) -> Iterator["Part"]:
        return (self.select([place]) for place in range(len(self.rows)))


class WaitingList:
    """The rows of one size that wait before one stage, in the order of their arrival."""

    def __init__(self):
        self.parts: deque[Part] = deque()
        self.num_rows = 0

    def add(self, part: Part) -> None:
        self.parts.append(part)
        self.num_rows += len(part.rows)

    def take(self, max_rows: int) -> list[Part]:
        """Remove and return up to `max_rows` rows, those that have waited longest."""
        taken = []
        while self.parts and max_rows:
            part = self.parts.popleft()
            count = len(part.rows)
            if count > max_rows:
                self.parts.appendleft(part.select(list(range(max_rows, count))))
                part = part.select(list(range(max_rows)))
            taken.append(part)
            max_rows -= len(part.rows)
            self.num_rows -= len(part.rows)
        return taken

    @property
    def oldest(self) -> Row:
        return self.parts[0].rows[0]


class Lane:
    """The waiting lists of rows whose policies have the same criterion and evaluate the same exits."""

    def __init__(self, model: EarlyExitMixin, policy: ExitPolicy | None):
        self.exits = model.evaluated_exits(policy)
        self.scorer = policy and policy.scorer
        self.tempered = policy is not None and bool(policy.temperatures)
        self.waiting: list[dict[Hashable, WaitingList]] = [defaultdict(WaitingList) for _ in self.exits]

    def lists(self) -> Iterator[tuple[int, Hashable, WaitingList]]:
        """(stage, size, list) of each list; empty ones have been deleted."""
        for stage, by_size in enumerate(self.waiting):
            for size, waiting in by_size.items():
                yield stage, size, waiting


class StageWorker:
    """Runs rows through the stages on one thread, one waiting list per step.

    A step takes, in this order of preference:
    1. of the lists before a deeper stage that are full or have waited for `max_wait` seconds, the deepest;
    2. of the lists before the first stage, the one whose oldest row arrived first;
    3. the deepest list.
    So rows of several requests gather before the deeper stages while there is other work, and no row waits while there
    is none.

    Args:
        model: an early-exit model in eval mode.
        max_rows: the largest number of rows per step.
        max_wait: seconds.
        observer: its methods are called at each event.
        auditor: chooses rows that continue to the last exit; `None`: no row does.
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        max_rows: int,
        max_wait: float,
        observer: EngineObserver,
        auditor: "Auditor | None" = None,
    ):
        self.model, self.max_rows, self.max_wait, self.observer = model, max_rows, max_wait, observer
        self.auditor = auditor
        self._text = model.main_input_name == "input_ids"
        self._lanes: dict[tuple, Lane] = {}
        self._known: tuple[ExitPolicy | None, Lane] | None = None
        # Requests that were answered or have failed (with the error), and the number of rows that need no more work.
        self.finished: list[tuple[Request, Exception | None]] = []
        self.num_through = 0

    def add(self, rows: list[Row]) -> None:
        """Put the rows of one request before the first stage."""
        if self.auditor is not None:
            self.auditor.choose(rows)
        now = time.perf_counter()
        waiting = self._lane(rows[0].request.policy).waiting[0]
        for row in rows:
            row.waits_since = now
            waiting[row.size].add(Part([row]))

    def num_waiting(self) -> int:
        return sum(waiting.num_rows for lane in self._lanes.values() for _, _, waiting in lane.lists())

    def step(self) -> bool:
        """Run one stage on rows that wait; `False`: no row waits."""
        chosen = self._choose(time.perf_counter())
        if chosen is None:
            return False
        lane, stage, size = chosen
        waiting = lane.waiting[stage][size]
        parts = [self._without_dropped(part) for part in waiting.take(self.max_rows)]
        if not waiting.parts:
            del lane.waiting[stage][size]
        parts = [part for part in parts if part.rows]
        if parts:
            self._run(lane, stage, parts)
        return True

    def _lane(self, policy: ExitPolicy | None) -> Lane:
        if self._known is None or self._known[0] is not policy:
            kind = Decisions.kind(self.model, policy)
            if kind not in self._lanes:
                # Requests may bring policies of any kind: lanes that are no longer used are deleted.
                self._lanes = {key: lane for key, lane in self._lanes.items() if any(lane.waiting)}
                self._lanes[kind] = Lane(self.model, policy)
            self._known = policy, self._lanes[kind]
        return self._known[1]

    def _choose(self, now: float) -> tuple[Lane, int, Hashable] | None:
        due = new = deepest = None
        for lane in self._lanes.values():
            for stage, size, waiting in lane.lists():
                here, depth = (lane, stage, size), lane.exits[stage]
                if stage == 0:
                    if new is None or waiting.oldest.request.arrived < new[0]:
                        new = waiting.oldest.request.arrived, here
                    continue
                if deepest is None or depth > deepest[0]:
                    deepest = depth, here
                if waiting.num_rows >= self.max_rows or now - waiting.oldest.waits_since >= self.max_wait:
                    if due is None or depth > due[0]:
                        due = depth, here
        chosen = due or new or deepest
        return chosen and chosen[1]

    def _without_dropped(self, part: Part) -> Part:
        left = [place for place, row in enumerate(part.rows) if not row.dropped]
        if len(left) < len(part.rows):
            self.drop(len(part.rows) - len(left))
        return part.select(left) if left else Part([])

    def drop(self, num_rows: int) -> None:
        """Count rows whose answers are no longer needed as done."""
        self.num_through += num_rows
        self.observer.dropped(num_rows)

    def _run(self, lane: Lane, stage: int, parts: list[Part]) -> None:
        rows = [row for part in parts for row in part.rows]
        now = time.perf_counter()
        try:
            examples, logits, exits = self._compute(lane, stage, parts, rows)
        except Exception as error:
            if len(rows) > 1:  # only the row at fault may fail
                for part in parts:
                    for single in part.singles():
                        self._run(lane, stage, [single])
                return
            row = rows[0]
            row.audited = False
            if row.logits is None:
                self.num_through += 1
                self.finished.append((row.request, error))
            return
        exit_index = lane.exits[stage]
        last = exit_index == self.model.num_exits - 1
        if stage == 0:
            for row in rows:
                row.inputs = None
        self.observer.stage_ran(exit_index, len(rows), [now - row.waits_since for row in rows])
        answers = logits.detach().float().cpu() if any(exits) else None
        now, left = time.perf_counter(), []
        for place, row in enumerate(rows):
            if exits[place] and row.logits is None:
                self._answer(row, exit_index, answers[place], now)
            if last:
                row.last_logits = answers[place]
            elif row.logits is None or row.audited:
                row.waits_since = now
                left.append(place)
        if last and self.auditor is not None:
            for difference in self.auditor.settle():
                self.observer.audited(difference, self.auditor.monitor.alarm)
        if left:
            part = Part(rows, examples).select(left)
            lane.waiting[stage + 1][rows[0].size].add(part)

    def _answer(self, row: Row, exit_index: int, logits: torch.Tensor, now: float) -> None:
        row.exit_index, row.logits = exit_index, logits
        self.observer.answered(exit_index, now - row.request.arrived)
        self.num_through += 1
        row.request.num_answered += 1
        if row.request.num_answered == len(row.request.rows):
            self.finished.append((row.request, None))

    def _compute(self, lane: Lane, stage: int, parts: list[Part], rows: list[Row]):
        """The examples after a stage, their logits, and which of them exit."""
        model, exit_index = self.model, lane.exits[stage]
        examples = self._embed(rows) if stage == 0 else Examples.join([part.examples for part in parts])
        if self._text:
            width = max(row.length for row in rows)
            examples = examples.trim(width, any(row.masked or row.length < width for row in rows))
        after = lane.exits[stage - 1] if stage else -1
        hidden, logits = model.run_stage(exit_index, examples, model.make_context(examples), examples.logits, after)
        boosted = model.config.exit_aggregation == "boosted"
        examples = replace(examples, hidden=hidden, logits=logits if boosted else None)
        if exit_index == model.num_exits - 1:
            return examples, logits, [True] * len(rows)
        if lane.scorer is None:
            return examples, logits, [False] * len(rows)
        policies = [row.request.policy for row in rows]
        thresholds = self._numbers([policy.thresholds[exit_index] for policy in policies])
        temperatures = None
        if lane.tempered:
            temperatures = self._numbers([policy.temperatures[exit_index] for policy in policies])[:, None]
        exits, examples.state = decide(lane.scorer, logits, examples.state, thresholds, temperatures)
        return examples, logits, exits.tolist()

    def _embed(self, rows: list[Row]) -> Examples:
        inputs = pad_rows([row.inputs for row in rows], self.model.config)
        return self.model.embed(**{name: value.to(self.model.device) for name, value in inputs.items()})

    def _numbers(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.model.device)
