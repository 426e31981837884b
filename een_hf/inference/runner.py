"""`ExitRunner`: answers one batch at a time by captured programs."""

import inspect
import threading
from collections import OrderedDict
from contextlib import nullcontext

import torch

from ..models import EarlyExitClassifierOutput, EarlyExitMixin, ExitConfigurationError, ExitPolicy
from ..models.stages import Examples
from .programs import (
    MAX_LANES,
    Decisions,
    Lane,
    LaneOfOne,
    ModelTensors,
    autocast_dtype,
    fastest_size,
    fill_inputs,
    graphs_on,
    input_shapes,
    main_input,
    on_device,
    rounded_length,
    row_bucket,
    seconds_of,
    wait_for,
)


MAX_ROWS = 512


class ExitRunner:
    """Answers batches as `model(**inputs)` does in eval mode, by programs captured as CUDA graphs.

    Programs are captured on first use, for batch sizes rounded up to powers of two and lengths rounded up to multiples
    of 16 tokens. Beyond `MAX_LANES` shapes the least recently used is dropped. Later programs of a batch run on fewer
    rows as examples exit.

    Weights that are trained in place need no new capture. Tensors and modules that are replaced
    (`load_state_dict(assign=True)`, `.to()`, added adapters) are noticed at the next call, which captures again; until
    then the memory of the replaced ones is kept. Other attributes of modules are read at capture only. Threads and
    streams that share a runner run one after the other.

    Args:
        model: an early-exit model.
        policy: the exit policy; `None`: the model's own, read at each call.
        cuda_graphs: `None` or `True`: CUDA graphs on CUDA; `False`: the same programs run eagerly.
        compile: whether stages go through `torch.compile` first: slower to start, the same answers.

    Raises:
        ExitConfigurationError: the policy does not fit the model.

    Example:
        >>> runner = een_hf.ExitRunner(model.eval())
        >>> outputs = runner(**tokenizer(["A fine film.", "A dull one."], padding=True, return_tensors="pt"))
        >>> outputs.logits.shape, outputs.exit_index
        (torch.Size([2, 2]), tensor([...]))
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        policy: ExitPolicy | dict | None = None,
        cuda_graphs: bool | None = None,
        compile: bool = False,
    ):
        self.model, self.policy = model, model.checked_policy(policy)
        self.cuda_graphs = cuda_graphs is not False
        self._turn, self._is_text = _Turn(), model.main_input_name == "input_ids"
        self._names = frozenset(input_names(model))
        self._sizes: dict[int, int] = {}
        # Of masks on the device: the shapes that have been seen with padding, and the shape that is being checked.
        self._padded: dict[tuple, bool] = {}
        self._guessed = None
        self._stage = torch.compile(model.run_stage, dynamic=True) if compile else model.run_stage
        self._forget()

    def under(self, policy: ExitPolicy | dict | None) -> "ExitRunner":
        """A runner of the same model with another policy. Both run one after the other, their graphs share memory.

        Args:
            policy: as for the class.

        Returns:
            the other runner.

        Raises:
            ExitConfigurationError: the policy does not fit the model.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.policy = self.model.checked_policy(policy)
        other._drop_programs()
        return other

    def _drop_programs(self) -> None:
        self._kinds: dict[tuple, Decisions] = {}
        self._decisions: Decisions | None = None
        self._lanes: OrderedDict[tuple, Lane] = OrderedDict()

    def _forget(self) -> None:
        self.device, self._parameter = self.model.device, next(self.model.parameters())
        self._graphs = graphs_on(self.device) if self.cuda_graphs else None
        if self.device.type == "cuda":
            with torch.inference_mode(False):
                self._unmasked = torch.ones((), dtype=torch.bool, pin_memory=True)
            self._looked = torch.cuda.Event()
        self._drop_programs()
        self._tensors = ModelTensors(self.model)

    def _is_current(self) -> bool:
        """Whether the programs still fit the model, its weights and its policy; forgets those that do not."""
        policy = self._policy()
        if policy is not self._decisions.policy:
            self._decide_by(policy)
            return False
        if not self._tensors.are_current():
            self._forget()
            return False
        return True

    def _policy(self) -> ExitPolicy | None:
        return self.model.get_exit_policy() if self.policy is None else self.policy

    def _decide_by(self, policy: ExitPolicy | None) -> None:
        kind = Decisions.kind(self.model, policy)
        if kind not in self._kinds:
            self._kinds[kind] = Decisions(self.model, policy)
        self._decisions = self._kinds[kind]
        self._decisions.set(policy)

    def __call__(self, **inputs) -> EarlyExitClassifierOutput:
        """Answer one batch.

        Args:
            **inputs: as `model(...)` takes them, each (batch, ...), on any device; labels and columns that are no
                input of the network are ignored.

        Returns:
            `logits` (batch, num_labels) and `exit_index` (batch,), int64, 0-based; without a policy those of the last
            exit.

        Raises:
            ExitConfigurationError: the model is in training mode, the batch has no examples, a text is longer than the
                model takes, or a mask is not (batch, length).
        """
        if self.model.training:
            raise ExitConfigurationError("ExitRunner answers in eval mode: call model.eval().")
        # In this order: to leave inference mode is to record gradients again.
        with self._turn.lock, torch.inference_mode(False), torch.no_grad(), self._on_device():
            return self._run(inputs)

    def _on_device(self):
        """Follow the model to its device, let this stream wait for the last one, and return the device's context."""
        if self._parameter.device != self.device:
            self._forget()
        if self.device.type != "cuda":
            return nullcontext()
        before, here = self._turn.stream, torch.cuda.current_stream(self.device)
        if before is not None and before.cuda_stream != here.cuda_stream:
            here.wait_stream(before)
        self._turn.stream = here
        other = self.device.index not in (None, torch.cuda.current_device())
        return torch.cuda.device(self.device) if other else nullcontext()

    def _run(self, inputs: dict) -> EarlyExitClassifierOutput:
        if self._decisions is None:
            self._decide_by(self._policy())
        lane, batch = self._load(inputs)
        last = len(lane.decisions.segments) - 1
        rows, present = row_bucket(batch, lane.capacity), batch
        # A graph reads the tensors that it was captured with, so it may run before it is known whether the model still
        # uses them. An eager program reads the model's own tensors: check first.
        replays = lane.replays(0, rows)
        if not (replays or self._is_current()):
            return self._run(inputs)
        for segment in range(last + 1):
            lane.run(segment, rows)
            if segment == 0:  # while the device is busy
                if not ((not replays or self._is_current()) and self._guessed_right()):
                    return self._run(inputs)
                outputs = EarlyExitClassifierOutput(logits=lane.places, exit_index=lane.places)  # names, as yet
            if segment == last:
                break
            if not lane.may_shrink(segment, rows, present):
                # Examples that have exited, their answers written, stay in the batch until it pays to wait for fewer.
                present *= lane.shares[segment]
                continue
            present = lane.count_after(segment)
            if present == 0:
                break
            rows = row_bucket(present, lane.capacity)
        outputs.logits, outputs.exit_index = lane.answers(batch)
        return outputs

    def _load(self, inputs: dict) -> tuple[Lane, int]:
        """Copy these inputs into their lane; returns the lane and the size of the batch."""
        inputs = {n: v for n, v in inputs.items() if v is not None and n in self._names}
        text, padded = self._is_text, False
        batch, length = main_input(inputs, self.model.main_input_name).shape[:2]
        self.model.check_count(batch)
        wanted = length
        if text:
            self.model.config.check_input_length(length, "A text, or one beside it,")
            wanted = rounded_length(length, self.model.config.max_input_length)
            mask = inputs.pop("attention_mask", None)
            self.model.check_padding(mask, (batch, length))
            padded = wanted > length or (mask is not None and self._guess_padded(mask))
            if padded:
                inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64) if mask is None else mask
        lane = self._lane(batch, input_shapes(inputs, length, wanted), padded)
        fill_inputs(lane.inputs, inputs, batch, self.model.config)
        lane.start(batch)
        return lane, batch

    def _guess_padded(self, mask: torch.Tensor) -> bool:
        """Whether a mask contains a zero.

        A mask on the device is not waited for: the answer is whether an earlier one of its shape did, and
        `_guessed_right` checks it later.
        """
        if not mask.is_cuda or self.device.type != "cuda":
            return not bool(mask.all())
        guess = self._padded.get(mask.shape, False)
        if not guess:
            self._unmasked.copy_((mask != 0).all(), non_blocking=True)
            self._looked.record()
            self._guessed = mask.shape
        return guess

    def _guessed_right(self) -> bool:
        """Whether the batch that runs without its mask has no padding; if it has, its shape keeps the mask later."""
        shape, self._guessed = self._guessed, None
        if shape is None:
            return True
        wait_for(self._looked)
        if not bool(self._unmasked):
            self._padded[shape] = True
        return bool(self._unmasked)

    def _lane(self, batch: int, shapes: tuple, padded: bool) -> Lane:
        capacity = 1 << (batch - 1).bit_length()
        key = (capacity, shapes, padded, id(self._decisions), autocast_dtype(self.device))
        lane = self._lanes.get(key)
        if lane is None:
            graphs = self._graphs if self._tensors.can_capture(padded) else None
            kind = LaneOfOne if capacity == 1 else Lane
            lane = kind(self.model, self._decisions, capacity, shapes, padded, graphs, self._stage)
            self._lanes[key] = lane
            if len(self._lanes) > MAX_LANES:
                self._lanes.popitem(last=False)
        self._lanes.move_to_end(key)
        return lane

    def fastest_batch_size(self, inputs: dict) -> int:
        """The smallest batch size, a power of two up to `MAX_ROWS`, beyond which the time per example hardly falls.

        Measured once for each length, on one layer, as a graph where the runner uses graphs.

        Args:
            inputs: model inputs of one example, each (1, ...).

        Returns:
            number of examples.
        """
        model = self.model
        with self._turn.lock, torch.inference_mode(False), torch.no_grad(), self._on_device():
            inputs = {name: value for name, value in inputs.items() if name not in ("labels", "attention_mask")}
            example = model.embed(**on_device(inputs, model.device))
            length = rounded_length(example.hidden.shape[1], None)
            if length not in self._sizes:
                self._sizes[length] = fastest_size(lambda size: self._layer_seconds(example, size), MAX_ROWS)
            return self._sizes[length]

    def _layer_seconds(self, example: Examples, size: int) -> float:
        examples = example.map(lambda tensor: tensor[:1].expand(size, *tensor.shape[1:]).contiguous())
        context = self.model.make_context(examples)
        return seconds_of(lambda: self.model.run_layer(0, examples.hidden, context), self._graphs)

    def __deepcopy__(self, memo):
        return None  # a copy of the model captures its own graphs

    def __reduce__(self):
        return type(None), ()

    def memory(self) -> int:
        """The memory that the programs hold: their static tensors, and the pool of the graphs.

        Returns:
            number of bytes.
        """
        held = sum(lane.nbytes() for lane in self._lanes.values())
        if self._graphs is None:
            return held
        pool, _ = self._graphs
        segments = torch.cuda.memory_snapshot()
        return held + sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pool))


class _Turn:
    """Makes runners that share memory run one at a time, and each stream wait for the one before."""

    def __init__(self):
        self.lock = threading.Lock()
        self.stream: torch.cuda.Stream | None = None  # where the last one ran


def runner_of(model: EarlyExitMixin) -> ExitRunner:
    """The runner of a model, made on first use and kept in the model."""
    runner = vars(model).get("_exit_runner")
    if runner is None or runner.model is not model or runner.device != model.device:
        runner = vars(model)["_exit_runner"] = ExitRunner(model)
    return runner


def runs_graphs(model: EarlyExitMixin, cuda_graphs: bool | None) -> bool:
    """Whether a runner answers for a model: `cuda_graphs`; if it is `None`, on CUDA where `model.cuda_graphs`."""
    return model.device.type == "cuda" and model.cuda_graphs if cuda_graphs is None else cuda_graphs


def input_names(model: EarlyExitMixin) -> list[str]:
    """The names of the model's inputs, its main input first."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _NO_INPUTS]
    return sorted(names, key=lambda name: name != model.main_input_name)


_NO_INPUTS = ("self", "labels", "early_exit")
