"""`AsyncExitEngine`: accepts requests at any time; the examples of many requests run the stages together."""

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
from ..inference.programs import LENGTH_STEP
from ..models import EarlyExitMixin, ExitConfigurationError, ExitError, ExitPolicy
from ..models.criteria import answer_confidence
from .auditing import Auditor
from .reading import Reader
from .stages import EngineObserver, Request, StageWorker


logger = logging.getLogger(__name__)


class EngineBusyError(ExitError, RuntimeError):
    """The queue is full, so that no more rows are accepted for now.

    Args:
        waiting: number of rows that wait.
        retry_after: seconds after which to try again.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} rows wait, and no more are accepted: try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class EngineClosedError(ExitError, RuntimeError):
    """The engine has not been started, or has been stopped."""


@dataclass
class ExitAnswers(ExitPredictions):
    """The answers of one request, in the order of its examples.

    Args:
        logits: (num_examples, num_labels), each example's at its own exit.
        exit_index: (num_examples,), int64, the 0-based exit of each example.
        confidence: (num_examples,), as in `ExitPredictions`.
        policy: the policy that the examples exited by; `None`: no early exit.
        lengths: number of tokens of each example; 0 for images.
    """

    policy: ExitPolicy | None = None
    lengths: list[int] = field(default_factory=list)


class AsyncExitEngine:
    """Answers requests of an event loop with early exits, continuously batched.

    New rows join before the first stage at any time, and a row is answered as soon as it exits. Rows of different
    requests that continue wait before each stage and run together (`StageWorker` says when). Every answer equals that
    of `model(...)` for this row alone. One thread runs the model, another tokenizes texts (several decode images).
    Several policies are served at the same time; rows run together if their policies differ only in their numbers.

    Args:
        model: an early-exit model; it is put in eval mode.
        processor: its tokenizer or image processor; `None`: requests contain rows of model inputs.
        max_rows: the largest number of rows that run together. Default: 64 on CUDA, else 8, since on a CPU the time
            per row does not fall further.
        max_wait_ms: milliseconds that rows before a deeper stage wait for others while there is other work.
        max_waiting: the largest number of rows that are accepted and not answered; more are refused.
        max_length: tokens to which longer texts are truncated, at most what the model takes.
        max_pixels: larger images, given as bytes, are refused.
        length_step: texts run together if their lengths are equal when rounded up to a multiple of this; others join
            where that costs less padding than another step costs. Default: 16 on CUDA, else 4.
        observer: its methods are called at each event.
        auditor: monitors the policy's risk on a share of the rows; it does not delay their answers.
        cuda_graphs: run captured programs (default: on CUDA where `model.cuda_graphs` is true), each captured at the
            first use of its stage, number of rows and length. Elsewhere than on CUDA the same programs run eagerly.

    Raises:
        ExitConfigurationError: a number is out of its range.

    Example:
        >>> async def classify(texts):
        ...     async with een_hf.serving.AsyncExitEngine(model, tokenizer) as engine:
        ...         return await engine.predict(texts)
        >>> answers = asyncio.run(classify(["A fine film.", "A dull one."]))
        >>> answers.logits.shape, answers.exit_index
        (torch.Size([2, 2]), tensor([...]))
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
        cuda_graphs: bool | None = None,
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
        self.worker = StageWorker(model, max_rows, max_wait_ms / 1000, self.observer, auditor, cuda_graphs)
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
        """Start the threads; from now on requests are accepted on this event loop.

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
        """Answer the examples of one request. If the task is cancelled, its rows are removed before the next stage.

        Args:
            examples: texts, each a string or a pair of strings, or images (PIL, or the bytes of a file), or rows of
                model inputs (dicts of tensors or lists without a batch dimension).
            policy: the exit policy; `None`: the model's own; `False`: no early exit.
            timeout: seconds; `None`: no limit.

        Returns:
            the answers, in the order of the examples.

        Raises:
            ExitConfigurationError: no examples, some that cannot be read, or a policy that does not fit the model.
            EngineBusyError: more than `max_waiting` rows would wait.
            EngineClosedError: the engine has not been started, or has been stopped.
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
                self._read.put((request, None))  # it is the only request: the worker reads it without another thread
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
        values = policy.to_dict() if isinstance(policy, ExitPolicy) else policy
        return self.model.checked_policy(values), False

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
        except BaseException as error:  # the engine itself has failed: no request may wait for ever
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
        """Pass the requests that have been finished since the last step to the event loop."""
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
