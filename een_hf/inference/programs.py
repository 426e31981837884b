"""Captured programs: the stages of a network on static tensors, as CUDA graphs where there is CUDA.

A batch of one shape runs in a `Lane`. The exits at which examples can exit cut the network into segments. A program
runs one segment on the first R examples of the lane's buffers: the layers, the head, the decision. It writes the
answers to their places in the batch, and moves the examples that continue to the front of the next buffers. Only their
number is read by the host, which may then choose a smaller R. The rows beyond that number are surplus: their results
are written behind the batch, or to a spare place, the first of every static tensor.

On devices other than CUDA a program is the same function, run eagerly on the same tensors.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from ..models import ExitConfigurationError
from ..models.criteria import decide
from ..models.policies import ExitPolicy
from ..models.stages import Examples


# Texts are padded to a multiple of this many tokens; every such length has its own programs.
LENGTH_STEP = 16
MAX_LANES = 32


def rounded_length(length: int, longest: int | None) -> int:
    """The number of tokens that programs pad a text to.

    Args:
        length: number of its tokens.
        longest: the largest number that the model takes, if it is limited.
    """
    rounded = -(-length // LENGTH_STEP) * LENGTH_STEP
    return rounded if longest is None else min(rounded, longest)


def main_input(inputs: dict, name: str) -> torch.Tensor:
    """The main model input, by its name; of texts perhaps their embeddings instead.

    Raises:
        ExitConfigurationError: there is neither.
    """
    found = inputs.get(name)
    found = inputs.get("inputs_embeds") if found is None else found
    if found is None:
        raise ExitConfigurationError(f"Give {name}.")
    return found


def on_device(inputs: dict, device: torch.device) -> dict:
    """Model inputs on a device, and the constants among them."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def padding_token(config) -> int:
    """The token id that fills up texts; 0 if the config names none."""
    return getattr(config, "pad_token_id", None) or 0


def graphs_on(device: torch.device) -> tuple | None:
    """Memory pool and stream of CUDA graphs that never run at the same time; `None` where there is no CUDA."""
    return (torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)) if device.type == "cuda" else None


def row_bucket(count: int, capacity: int) -> int:
    """The smallest number of rows for which a lane of `capacity` rows has a program and which holds `count` examples.

    Args:
        count: number of examples.
        capacity: number of rows of the lane.

    Returns:
        number of rows.
    """
    step = max(1, capacity // (16 if capacity >= 64 else 8))
    return min(capacity, -(-count // step) * step)


def segments_of(model, policy: ExitPolicy | None) -> list[list[int]]:
    """The exits that are evaluated, cut after each at which examples can exit."""
    segments = [[]]
    for exit_index in model.evaluated_exits(policy):
        segments[-1].append(exit_index)
        if policy is not None and exit_index < model.num_exits - 1 and policy.lets_exit(exit_index):
            segments.append([])
    return segments


class Decisions:
    """A policy whose numbers are on the device, so that another policy of the same kind needs no new programs."""

    def __init__(self, model, policy: ExitPolicy | None):
        self.model, self.segments = model, segments_of(model, policy)
        self.scorer = policy and policy.scorer
        self.thresholds = torch.zeros(model.num_exits, device=model.device)
        self.temperatures = torch.ones_like(self.thresholds) if policy and policy.temperatures else None
        self.policy = None
        if policy is not None:
            self.set(policy)

    @staticmethod
    def kind(model, policy: ExitPolicy | None) -> tuple:
        """The properties of a policy that programs depend on."""
        if policy is None:
            return (str(segments_of(model, None)),)
        params = repr(sorted(policy.params.items()))
        return str(segments_of(model, policy)), policy.criterion, params, policy.temperatures is not None

    def set(self, policy: ExitPolicy | None) -> None:
        """Take the numbers of a policy of the same kind."""
        if policy is self.policy:
            return
        self.thresholds.copy_(torch.tensor(policy.thresholds, dtype=torch.float32))
        if self.temperatures is not None:
            self.temperatures.copy_(torch.tensor(policy.temperatures, dtype=torch.float32))
        self.policy = policy

    def run(
        self,
        segment: int,
        examples: Examples,
        run_stage: Callable,
        numbers: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> tuple[Examples, torch.Tensor, torch.Tensor | None]:
        """One segment: layers, heads and decision. This is what every program computes, whatever surrounds it.

        Args:
            segment: 0-based.
            examples: the examples after the segment before, or after `embed`.
            run_stage: the model's `run_stage`, as it is or compiled.
            numbers: thresholds and temperatures of each example, both (batch, num_exits); default: the policy's.

        Returns:
            the examples after the segment, the logits (batch, num_labels) of its exit, and which examples exit there,
            (batch,) bool. After the last segment all do, and the last value means nothing.
        """
        model, exits, done = self.model, self.segments[segment], None
        thresholds, temperatures = numbers or (self.thresholds, self.temperatures)
        after = self.segments[segment - 1][-1] if segment else -1
        context = model.make_context(examples)
        boosted = model.config.exit_aggregation == "boosted"
        for exit_index in exits:
            hidden, logits = run_stage(exit_index, examples, context, examples.logits, after)
            examples = replace(examples, hidden=hidden, logits=logits if boosted else None)
            scored = self.scorer is not None and (self.scorer.remembers or exit_index == exits[-1])
            if scored and exit_index < model.num_exits - 1:
                temperature = None if temperatures is None else temperatures[..., exit_index, None]
                threshold = thresholds[..., exit_index]
                done, examples.state = decide(self.scorer, logits, examples.state, threshold, temperature)
            after = exit_index
        return examples, logits, done


class ModelTensors:
    """The tensors of a model and where they are: a graph may only read these.

    Training in place is not noticed, since a graph reads what it has written. Tensors that are held here stay where
    they are until a graph that reads them is dropped.
    """

    def __init__(self, model):
        self.model, self.attention = model, model.config._attn_implementation
        modules = list(model.modules())
        self._parents = [module._modules for module in modules if module._modules]
        self._children = self._find_children()
        parts = [part for module in modules for part in (module._parameters, module._buffers)]
        self._holders = [(part, name) for part in parts for name, tensor in part.items() if tensor is not None]
        self._held = [part[name].detach() for part, name in self._holders]
        self._pointers = [tensor.data_ptr() for tensor in self._held]

    def _find_children(self) -> list[torch.nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._parents)))

    def are_current(self) -> bool:
        """Whether the model has the same modules, tensors and attention as before."""
        try:
            same = self._children == self._find_children()
            same = same and self._pointers == [part[name].data_ptr() for part, name in self._holders]
        except (KeyError, AttributeError):
            return False
        return same and self.attention == self.model.config._attn_implementation

    def can_capture(self, padded: bool) -> bool:
        """Whether a program can be captured; some implementations of attention search the mask for padding.

        Args:
            padded: whether the program has a mask.
        """
        return not padded or self.attention in ("eager", "sdpa")


class Lane:
    """Static tensors for batches of one shape and up to `capacity` examples, and the programs on them.

    Args:
        model: an early-exit model in eval mode.
        decisions: the decisions of the policy.
        capacity: the largest number of examples.
        shapes: of the model inputs, as `input_shapes` gives them.
        padded: whether `attention_mask` may contain zeros; if not, it is omitted.
        graphs: as `graphs_on` makes them; `None`: run eagerly.
        run_stage: the model's `run_stage`, as it is or compiled.
    """

    def __init__(
        self, model, decisions: Decisions, capacity: int, shapes: tuple, padded: bool, graphs: tuple | None, run_stage
    ):
        self.model, self.decisions, self.capacity, self.padded = model, decisions, capacity, padded
        self.graphs, self.run_stage = graphs, run_stage
        self.autocast, device = autocast_here(model.device), model.device
        self.inputs = static_inputs(shapes, capacity, device)
        self.places = torch.arange(capacity + 1, device=device)  # 0 is the spare one
        # Row s, from the right: how many of the first, of the first two, ... examples of segment s - 1 continue.
        self.ranks = torch.zeros((len(decisions.segments), capacity), dtype=torch.int64, device=device)
        self.counts = self.ranks[:, -1]  # the number of examples of each segment
        host = torch.zeros(self.counts.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.host_counts = host.numpy()
        # After each segment but the last: what the host reads, and where that is copied to.
        self.read = [(self.counts[n : n + 1], host[n : n + 1]) for n in range(1, len(decisions.segments))]
        self.events = [torch.cuda.Event() if device.type == "cuda" else None for _ in self.read]
        self.batch = 0
        # The share of the examples of a segment that continues after it, averaged over past batches; 0: not known.
        self.shares = [0.0] * len(self.read)
        self.buffers: list[Examples | None] = [None, None]  # a segment reads one and writes the other, in turn
        self.logits = self.exit_index = None
        self.programs: dict[tuple[int, int], _Program] = {}

    def replays(self, segment: int, rows: int) -> bool:
        """Whether a graph has been captured of this segment on `rows` rows."""
        program = self.programs.get((segment, rows))
        return program is not None and program.graph is not None

    def run(self, segment: int, rows: int) -> None:
        """Run a segment on the first `rows` examples."""
        key = (segment, rows)
        if key not in self.programs:
            self.programs[key] = _Program(self, segment, rows)
        self.programs[key]()
        if segment < len(self.read):
            (source, target), event = self.read[segment], self.events[segment]
            target.copy_(source, non_blocking=event is not None)
            if event is not None:
                event.record()

    def count_after(self, segment: int) -> int:
        """How many examples continue after a segment. Waits until the device has run the segment."""
        if self.events[segment] is not None:
            wait_for(self.events[segment])
        return self.count_on_host(segment)

    def count_on_host(self, segment: int) -> int:
        """How many examples continue after a segment that has run."""
        return int(self.host_counts[segment + 1])

    def may_shrink(self, segment: int, rows: int, present: float) -> bool:
        """Whether, judging by past batches, so many examples exit that the next segment can run on fewer rows.

        If not, the host does not have to wait for the number of examples.
        """
        return row_bucket(math.ceil(self.shares[segment] * present), self.capacity) < rows

    def answers(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (batch, num_labels) and exits (batch,) of the examples, in tensors that no program writes."""
        return self.logits[1 : batch + 1].clone(), self.exit_index[1 : batch + 1].clone()

    def start(self, batch: int) -> None:
        """Begin a batch of this size, and update the shares from the counts of the last batch that have arrived."""
        before = self.batch
        for segment, event in enumerate(self.events):
            if not before or (event is not None and not event.query()):
                break
            share, before = self.host_counts[segment + 1] / before, self.host_counts[segment + 1]
            self.shares[segment] = 0.8 * self.shares[segment] + 0.2 * share if self.shares[segment] else share
        if batch != self.batch:
            self.counts[0].fill_(batch)
            self.batch = batch

    def compute(self, segment: int, rows: int) -> None:
        """Run a segment. It may run twice without harm, since it writes nothing that it reads."""
        with self.autocast():
            self._compute(segment, rows)

    def _compute(self, segment: int, rows: int) -> None:
        exit_index, places = self.decisions.segments[segment][-1], self.places[1 : rows + 1]
        if segment == 0:
            examples = replace(self.embed(rows), ids=places)
        else:
            examples = self.buffers[segment % 2].map(lambda tensor: tensor[1 : rows + 1])
        examples, logits, done = self.decisions.run(segment, examples, self.run_stage)

        if self.logits is None:
            self.logits = logits.new_zeros(self.capacity + 1, logits.shape[-1])
            self.exit_index = self.places.new_zeros(self.capacity + 1)
        present = places <= self.counts[segment]
        if segment == 0:  # surplus rows are behind the batch
            self.logits[1 : rows + 1].copy_(logits)
            self.exit_index[1 : rows + 1].fill_(exit_index)
        else:
            targets = examples.ids * present
            self.logits.index_copy_(0, targets, logits)
            self.exit_index.index_fill_(0, targets, exit_index)
        if segment == len(self.read):
            return

        if self.buffers[(segment + 1) % 2] is None:
            self.buffers[(segment + 1) % 2] = examples.map(self._room)
        # Numbers at once, since `cumsum` would copy truth values to numbers first.
        continues = torch.gt(present, done, out=torch.empty_like(places))  # and not
        ranks = torch.cumsum(continues, 0, out=self.ranks[segment + 1, self.capacity - rows :])
        targets = ranks * continues
        following = self.buffers[(segment + 1) % 2].tensors()
        for buffer, tensor in zip(following, examples.tensors(), strict=True):
            buffer.index_copy_(0, targets, tensor)

    def embed(self, rows: int) -> Examples:
        """The first examples of the inputs, embedded."""
        return replace(self.model.embed(**first_rows(self.inputs, rows)), padded=self.padded or None)

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_ones((self.capacity + 1, *tensor.shape[1:]))

    def nbytes(self) -> int:
        """Bytes of the static tensors."""
        tensors = [value for value in self.inputs.values() if isinstance(value, torch.Tensor)]
        tensors += [tensor for examples in self.buffers if examples is not None for tensor in examples.tensors()]
        tensors += [tensor for tensor in (self.logits, self.exit_index) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)


class LaneOfOne(Lane):
    """A lane for one example: nothing is moved, each program reads the results of the one before."""

    def __init__(self, model, decisions: Decisions, *args):
        super().__init__(model, decisions, *args)
        # Of each segment: the example after it, and the logits of its exit.
        self.results: list[tuple[Examples, torch.Tensor] | None] = [None] * len(decisions.segments)
        self.exits = torch.tensor([exits[-1] for exits in decisions.segments], device=model.device).split(1)
        host = torch.zeros(len(self.read), dtype=torch.bool, pin_memory=model.device.type == "cuda")
        self.done, self.done_parts = host.numpy(), [host[n : n + 1] for n in range(len(host))]
        self.latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, segment: int, rows: int) -> None:
        super().run(segment, rows)
        # While the device is busy; if the example exits here, nothing is left to do.
        self.latest = self.results[segment][1].clone(), self.exits[segment].clone()

    def count_on_host(self, segment: int) -> int:
        return int(not self.done[segment])

    def may_shrink(self, segment: int, rows: int, present: float) -> bool:
        return True

    def start(self, batch: int) -> None:
        pass

    def answers(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.latest

    def _compute(self, segment: int, rows: int) -> None:
        examples = self.results[segment - 1][0] if segment else self.embed(rows)
        examples, logits, done = self.decisions.run(segment, examples, self.run_stage)
        self.results[segment] = examples, logits
        if segment < len(self.read):
            self.read[segment] = done, self.done_parts[segment]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type of autocast that holds now; `None`: it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_here(device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the autocast context that holds now, but without its cache: graphs would read casts that were freed."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return partial(torch.autocast, device.type, dtype, enabled, cache_enabled=False)


# For so many seconds an event is polled before the thread sleeps: waking up takes longer than most segments, but
# polling keeps other threads from running.
_PATIENCE = 3e-4


def wait_for(event: "torch.cuda.Event") -> None:
    """Wait until the device has reached `event`."""
    start = time.perf_counter()
    while not event.query():
        if time.perf_counter() - start > _PATIENCE:
            event.synchronize()
            return


class _Program:
    """One segment for one number of rows: captured at its first call, replayed at every call."""

    def __init__(self, lane: Lane, segment: int, rows: int):
        self.lane, self.segment, self.rows, self.graph = lane, segment, rows, None

    def __call__(self) -> None:
        if self.graph is None:
            run = partial(self.lane.compute, self.segment, self.rows)
            if self.lane.graphs is None:
                run()
                return
            self.graph = capture(run, *self.lane.graphs)
        self.graph.replay()


def capture(function: Callable[[], object], pool, stream) -> "torch.cuda.CUDAGraph":
    """Capture a CUDA graph of `function`.

    The function runs twice before the capture, so that libraries allocate their workspaces outside the graph.

    Args:
        function: reads and writes static tensors.
        pool: memory pool, shared by graphs that never run at the same time.
        stream: the stream to capture on; the pool reuses memory within one stream only.

    Returns:
        the graph.
    """
    here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    stream.synchronize()
    # If the garbage collector freed a graph or tensor during the capture, the capture would fail.
    collecting = gc.isenabled()
    gc.disable()
    try:
        # Other threads, for example those that send batches, may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            function()
    finally:
        if collecting:
            gc.enable()
    here.wait_stream(stream)
    return graph


def input_shapes(inputs: dict, length: int, width: int | None) -> tuple:
    """What programs depend on of model inputs.

    Args:
        inputs: by name, each (batch, ...); anything but a tensor is a constant.
        length: number of tokens.
        width: number of tokens to pad to.

    Returns:
        pairs of the name and, of a tensor, the padded shape (...) of one example and the dtype, else the constant.
    """
    return tuple(
        (name, (padded_shape(value, length, width), value.dtype) if isinstance(value, torch.Tensor) else value)
        for name, value in inputs.items()
    )


def padded_shape(value: torch.Tensor, length: int, width: int | None) -> tuple[int, ...]:
    """The shape (...) of one example of a model input (batch, ...) after its `length` tokens are padded to `width`."""
    shape = tuple(value.shape[1:])
    return (width, *shape[1:]) if shape and shape[0] == length else shape


def static_inputs(shapes: tuple, rows: int, device: torch.device) -> dict:
    """Tensors of so many rows for model inputs of these shapes, as `input_shapes` gives them, and the constants."""
    return {
        name: torch.zeros((rows, *value[0]), dtype=value[1], device=device) if isinstance(value, tuple) else value
        for name, value in shapes
    }


def first_rows(inputs: dict, rows: int) -> dict:
    """The first rows of static inputs, and the constants."""
    return {name: value[:rows] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def fill_inputs(static: dict, inputs: dict, count: int, config) -> None:
    """Copy model inputs into the first rows of static inputs; tokens beyond theirs become padding.

    Args:
        static: as `static_inputs` makes them, with as many tokens as the inputs, or more.
        inputs: by name, each (batch, ...), on any device.
        count: number of examples.
        config: config of the model, for its `pad_token_id`.
    """
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        target = static[name][:count]
        if target.shape != value.shape:
            target[:, value.shape[1] :].fill_(padding_token(config) if name == "input_ids" else 0)
            target = target[:, : value.shape[1]]
        target.copy_(value, non_blocking=True)


def fastest_size(seconds: Callable[[int], float], largest: int, smallest: int = 32) -> int:
    """The number of rows, doubled from `smallest` on, beyond which the time per row hardly falls.

    Args:
        seconds: the time that so many rows take together.
        largest: the largest number.
        smallest: the smallest number.
    """
    best, size = seconds(smallest) / smallest, smallest
    while 2 * size <= largest and (time_per_row := seconds(2 * size) / (2 * size)) <= _WORTH * best:
        best, size = time_per_row, 2 * size
    return size


# A larger batch is worth its memory if its time per row is at most this share of the smaller batch's.
_WORTH = 0.95


def seconds_of(function: Callable[[], object], graphs: tuple | None) -> float:
    """Time of one call.

    Args:
        function: reads and writes static tensors.
        graphs: memory pool and stream of the CUDA graph that is measured; `None`: `function` itself.
    """
    if graphs is None:
        function()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    graph = capture(function, *graphs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 5000
