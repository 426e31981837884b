"""`AsyncExitEngine`: requests join and answers leave at any time, survivors of many requests share the stages."""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from ..inference.predict import ExitPredictions
from ..inference.runner import LENGTH_STEP
from ..models import EarlyExitMixin, ExitConfigurationError, ExitPolicy
from ..models.policies import answer_confidence
from .auditing import Auditor
from .reading import Reader
from .stages import EngineObserver, Request, StageWorker


logger = logging.getLogger(__name__)


class EngineBusyError(RuntimeError):
    """So many rows wait that no more are accepted; `retry_after` says in how many seconds it is worth another try."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} rows wait, and no more are accepted: try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine has not been started, or has been stopped."""


@dataclass
class ExitAnswers(ExitPredictions):
    """The answers of one request, in the order of its examples.

    Args:
        policy: who exited by it; `None`: nobody before the last exit.
        lengths: of each example, in tokens; 0 for images.
    """

    policy: ExitPolicy | None = None
    lengths: list[int] = field(default_factory=list)


class AsyncExitEngine:
    """Answers requests of an event loop with early exits, continuously batched.

    Rows join before the first stage at any time and leave where they exit. Survivors of different requests wait before
    each stage and run together (`StageWorker` says when); every answer equals `model(...)` of that row alone. One
    thread owns the model, another reads texts (several read images). Several policies are served at the same time:
    rows whose policies differ in their numbers only share all stages.

    Args:
        model: an early-exit model; it is put in eval mode.
        processor: its tokenizer or image processor; `None`: requests hold rows of model inputs.
        max_rows: rows that run together. Default: 64 on CUDA, else 8, beyond which a CPU takes no less time per row.
        max_wait_ms: how long survivors wait for others while there is other work.
        max_waiting: rows that are accepted and unanswered; more are refused.
        max_length: longer texts are cut, to no more than the model takes.
        max_pixels: larger images, given as bytes, are refused.
        length_step: texts whose lengths, rounded up to a multiple of this, are equal run together. Default: 16 on
            CUDA, else 4.
        observer: is told what happens.
        auditor: watches the policy's risk on a share of the rows, whose answers it does not delay.

    Example:
        >>> async with AsyncExitEngine(model, tokenizer) as engine:
        ...     answers = await engine.predict(["A fine film.", "A dull one."])
        >>> answers.logits.shape, answers.exit_index
        (torch.Size([2, 2]), tensor([0, 2]))
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        processor=None,
        *,
        max_rows: int | None = None,
        max_wait_ms: float = 5.0,
        max_waiting: int = 1024,
        max_length: int | None = None,
        max_pixels: int = 50_000_000,
        length_step: int | None = None,
        observer: EngineObserver | None = None,
        auditor: Auditor | None = None,
    ):
        cuda = model.device.type == "cuda"
        max_rows = (64 if cuda else 8) if max_rows is None else max_rows
        for name, value in (("max_rows", max_rows), ("max_waiting", max_waiting), ("length_step", length_step)):
            if value is not None and value < 1:
                raise ExitConfigurationError(f"{name} must be at least 1, not {value}.")
        if not max_wait_ms >= 0:
            raise ExitConfigurationError(f"max_wait_ms must be at least 0, not {max_wait_ms}.")
        self.model, self.max_waiting = model.eval(), max_waiting
        self.observer, self.auditor = observer or EngineObserver(), auditor
        self.worker = StageWorker(model, max_rows, max_wait_ms / 1000, self.observer, auditor)
        length_step = length_step or (LENGTH_STEP if cuda else 4)
        self.reader = Reader(model, processor, max_length, length_step, max_pixels, self._has_been_read)
        self._read: queue.SimpleQueue[tuple[Request, Exception | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="een_hf stages", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._requests: set[Request] = set()
        self._num_waiting = 0
        self._rate = 0.0  # rows per second, over the last seconds
        self._counted, self._counted_since = 0, time.perf_counter()

    async def __aenter__(self) -> "AsyncExitEngine":
        await self.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the threads; requests are accepted on this event loop from now on.

        Raises:
            EngineClosedError: the engine has been started or stopped before.
        """
        if self._loop is not None or self._closed:
            raise EngineClosedError("An engine is started once: make another one.")
        self._loop, self._idle = asyncio.get_running_loop(), asyncio.Event()
        self._idle.set()
        self._thread.start()

    async def stop(self) -> None:
        """Accept no more requests, answer those that were accepted, then end the threads."""
        self._closed = True
        if not self._thread.is_alive():
            return
        await self._idle.wait()
        self._read.put(None)
        await asyncio.to_thread(self._thread.join)
        self.reader.close()

    @property
    def is_running(self) -> bool:
        """Whether requests are accepted."""
        return self._loop is not None and not self._closed and self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Rows that have been accepted and not been answered."""
        return self._num_waiting

    async def predict(
        self,
        examples: Sequence,
        policy: ExitPolicy | dict | bool | None = None,
        timeout: float | None = None,
    ) -> ExitAnswers:
        """Answer the examples of one request. A task that is cancelled takes its rows with it, at the next stage.

        Args:
            examples: texts, each a string or a pair of two, or images (PIL, or the bytes of a file), or rows of model
                inputs (dicts without a batch dimension).
            policy: who exits; `None`: the model's own; `False`: nobody before the last exit.
            timeout: seconds.

        Returns:
            `ExitAnswers`, in the order of the examples.

        Raises:
            ExitConfigurationError: no examples, some that cannot be read, or a policy that does not fit the model.
            EngineBusyError: more than `max_waiting` rows would wait.
            EngineClosedError: the engine does not run.
            asyncio.TimeoutError: the answers took longer than `timeout`.
        """
        if not self.is_running:
            raise EngineClosedError("The engine does not run: `await engine.start()`, or it has been stopped.")
        examples, count = list(examples), len(examples)
        if count == 0:
            raise ExitConfigurationError("A request holds at least one example.")
        if count > self.max_waiting:
            raise ExitConfigurationError(f"A request holds {count} examples; at most {self.max_waiting} may wait.")
        chosen, own = self._policy_of(policy)
        if self._num_waiting + count > self.max_waiting:
            self.observer.refused(count)
            raise EngineBusyError(self._num_waiting, self._seconds_to_room())
        request = Request(examples, chosen, self._loop.create_future(), own)
        self._num_waiting += count
        self._idle.clear()
        self._requests.add(request)
        try:
            if self._num_waiting == count:
                self._read.put((request, None))  # nobody else is there: the worker reads it itself, a thread less
            else:
                self.reader.submit(request)
            return await asyncio.wait_for(request.future, timeout)
        finally:
            self._requests.discard(request)

    def _policy_of(self, policy) -> tuple[ExitPolicy | None, bool]:
        if policy is None:
            if self.auditor is not None and self.auditor.stops_exits:
                return None, False
            return self.model.get_exit_policy(), True
        if policy is False:
            return None, False
        policy = ExitPolicy.from_dict(policy.to_dict() if isinstance(policy, ExitPolicy) else policy)
        policy.validate(self.model.num_exits, self.model.config.problem_type, self.model.config.num_labels)
        return policy, False

    def _seconds_to_room(self) -> float:
        return max(1.0, math.ceil(self._num_waiting / self._rate)) if self._rate else 1.0

    def _has_been_read(self, request: Request, error: Exception | None) -> None:
        self._read.put((request, error))

    # The worker's thread

    def _work(self) -> None:
        worker, ending = self.worker, False
        try:
            with torch.no_grad():
                while True:
                    busy = worker.step()
                    self._hand_over()
                    if not busy and ending:
                        return
                    while True:
                        try:
                            item = self._read.get(block=not busy and not ending)
                        except queue.Empty:
                            break
                        busy = True
                        if item is None:
                            ending = True
                        else:
                            self._accept(*item)
        except BaseException as error:  # a fault of the engine: nobody may wait for ever
            self._closed = True
            logger.exception("The engine has failed and accepts no more requests.")
            with suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._fail_all, error)

    def _accept(self, request: Request, error: Exception | None) -> None:
        if error is None and request.examples is not None:
            self.reader.read([request])
        elif error is not None:
            self.worker.finished.append((request, error))
            self.worker.num_through += len(request.examples)
        elif request.dropped:
            self.worker.drop(len(request.rows))
        else:
            self.worker.add(request.rows)

    def _hand_over(self) -> None:
        """Give the event loop what has been finished since the last step."""
        finished, count = self.worker.finished, self.worker.num_through
        if not (finished or count):
            return
        self.worker.finished, self.worker.num_through = [], 0
        self._measure(count)
        results = [(request, error or self._answers(request)) for request, error in finished]
        self._loop.call_soon_threadsafe(self._finish, results, count)

    def _measure(self, count: int) -> None:
        self._counted += count
        elapsed = time.perf_counter() - self._counted_since
        if elapsed > 1:
            self._rate, self._counted, self._counted_since = self._counted / elapsed, 0, time.perf_counter()

    def _answers(self, request: Request) -> ExitAnswers:
        logits = torch.stack([row.logits for row in request.rows])
        exit_index = torch.tensor([row.exit_index for row in request.rows])
        tempered = logits if request.policy is None else request.policy.temper(logits, exit_index)
        confidence = answer_confidence(tempered, self.model.config.problem_type)
        lengths = [row.length for row in request.rows]
        return ExitAnswers(logits, exit_index, confidence, request.policy, lengths)

    # On the event loop

    def _finish(self, results: list[tuple[Request, ExitAnswers | Exception]], count: int) -> None:
        self._num_waiting -= count
        if self._num_waiting == 0:
            self._idle.set()
        for request, result in results:
            if request.future.done():
                continue
            if isinstance(result, Exception):
                request.future.set_exception(result)
            else:
                request.future.set_result(result)

    def _fail_all(self, error: BaseException) -> None:
        for request in self._requests:
            if not request.future.done():
                request.future.set_exception(EngineClosedError(f"The engine has failed: {type(error).__name__}."))
        self._idle.set()
