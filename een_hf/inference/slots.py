"""Slots: tensors that hold the examples of many batches between the stages, and the programs that run on them."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from ..models import EarlyExitMixin, ExitPolicy
from ..models.stages import Examples
from .programs import (
    MAX_LANES,
    Decisions,
    ModelTensors,
    autocast_dtype,
    autocast_here,
    capture,
    fastest_size,
    fill_inputs,
    first_rows,
    input_shapes,
    main_input,
    on_device,
    padded_shape,
    rounded_length,
    row_bucket,
    seconds_of,
    static_inputs,
    wait_for,
)


MAX_PROGRAMS = 512
MAX_SHAPES = 8
# The first two slots belong to no example: surplus rows of a program read the one, and write the other.
_READ, _WRITTEN = 0, 1


def send(values: list, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Numbers as a tensor on the device, without a wait for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class Step:
    """One segment on some examples, perhaps still at work.

    Args:
        exit_index: 0-based exit of the segment.
        slots: of the examples, in the order of the rows.
        logits: (rows, num_labels), of this exit, on the device.
    """

    exit_index: int
    slots: list[int]
    logits: torch.Tensor
    _exits: torch.Tensor | None = None  # on the host; `None`: all exit
    _event: "torch.cuda.Event | None" = None

    def exits(self) -> list[bool]:
        """Which of the examples exit here; waits for the device."""
        if self._exits is None:
            return [True] * len(self.slots)
        if self._event is not None:
            wait_for(self._event)
        return self._exits[: len(self.slots)].tolist()


@dataclass(eq=False)
class _Program:
    """One segment on so many rows and columns; its graph, once captured, and what that writes."""

    segment: int
    rows: int
    width: int | None
    padded: bool
    inputs: dict = field(default_factory=dict)
    graph: "torch.cuda.CUDAGraph | None" = None
    columns: int = 0  # of the hidden states
    logits: torch.Tensor | None = None
    exits: torch.Tensor | None = None

    def keep(self, logits: torch.Tensor, exits: torch.Tensor | None) -> None:
        """Keep what the segment answers, from the second time on in the same tensors: outside of a graph's memory."""
        if self.logits is None:
            self.logits, self.exits = logits, exits
            return
        self.logits.copy_(logits)
        if exits is not None:
            self.exits.copy_(exits)


class Slots:
    """Examples in flight, each in a slot: a row of static tensors that holds what the next segment reads.

    A program runs one segment on any slots. It gathers their rows, runs `Decisions.run`, and writes the rows back; the
    host reads which examples exit, and keeps lists of slot numbers as queues. So examples that started in different
    batches run together, and no tensor is moved or joined when examples exit, wait, change places or are dropped.
    Each example has thresholds and temperatures of its own. Texts of different length share the slots; images of
    another size need others.

    Static programs run on rounded numbers of rows and tokens, as CUDA graphs that are captured at the first use where
    there are `graphs`; surplus rows read and write slots of no example.

    Args:
        model: an early-exit model in eval mode.
        policy: decides which segments there are, and by which criterion examples exit.
        max_rows: the largest number of examples of one step.
        static: whether programs run on rounded numbers of rows and tokens.
        graphs: as `graphs_on` makes them; `None`: static programs run eagerly.
        num_slots: for so many examples at first; where more are in flight, the tensors grow.
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        policy: ExitPolicy | None,
        max_rows: int,
        *,
        static: bool = False,
        graphs: tuple | None = None,
        num_slots: int | None = None,
    ):
        self.model, self.max_rows, self.static, self.graphs = model, max_rows, static, graphs
        self.device, self._text = model.device, model.main_input_name == "input_ids"
        # On the host, of each slot: tokens, whether some before the last are masked, columns written since the columns
        # behind those of its example were cleared, and whose thresholds it holds.
        self.widths: list[int] = []
        self._masked: list[bool] = []
        self._reach: list[int] = []
        self._policies: list[ExitPolicy | None] = []
        self.free: list[int] = []
        self.changed = False  # whether the latest step may have written to its slots
        self._rows: Examples | None = None
        self._views: dict[tuple[int, bool], Examples] = {}
        self._numbers: tuple[torch.Tensor, ...] = ()
        with torch.inference_mode(False):  # tensors made in inference mode can be written in it only
            self.decisions = Decisions(model, policy)
            self._indices = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
            self._add_slots(num_slots or 2 * max_rows)
        # The exit of each segment.
        self.exits = [segment[-1] for segment in self.decisions.segments]
        self._inputs: OrderedDict[tuple, dict] = OrderedDict()
        self._programs: OrderedDict[tuple, _Program] = OrderedDict()
        self._sizes: dict[tuple, int] = {}
        self._tensors = ModelTensors(model) if static else None

    @property
    def num_slots(self) -> int:
        """Examples that there is room for."""
        return len(self.widths) - 2

    @property
    def num_in_flight(self) -> int:
        """Examples that have a slot."""
        return self.num_slots - len(self.free)

    def start(
        self,
        inputs: dict,
        widths: list[int] | None = None,
        masked: list[bool] | None = None,
        policies: list[ExitPolicy] | None = None,
    ) -> Step:
        """Run the first segment on new examples, each of which takes a slot, unless it is the last segment too.

        Args:
            inputs: model inputs, each (batch, ...), up to `max_rows` examples; texts with a 2-D mask or without.
            widths: tokens of each text, padding behind them left out; default: read from the mask.
            masked: whether its own mask has zeros among them.
            policies: one per example, all of the kind of `policy`; default: that one.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        main = main_input(inputs, self.model.main_input_name)
        count, width, padded = len(main), None, False
        if self._text:
            mask = inputs.setdefault("attention_mask", torch.ones(main.shape[:2], dtype=torch.int64))
            if widths is None:
                widths, masked = _measure(mask)
            used, length = max(widths), main.shape[1]
            width = self._rounded(used)
            padded = width > min(widths) or any(masked)
            if used < length:
                inputs = {
                    n: v[:, :used] if isinstance(v, torch.Tensor) and padded_shape(v, length, 0)[:1] == (0,) else v
                    for n, v in inputs.items()
                }
        with torch.inference_mode(False), torch.no_grad(), _on(self.device):
            if len(self.exits) == 1:
                return self._launch(0, [_WRITTEN] * count, width, padded, inputs)[0]
            slots = self._take(count)
            try:
                self._set_policies(slots, policies)
                step, program = self._launch(0, slots, width, padded, inputs)
            except Exception:
                self.release(slots)
                raise
        for place, slot in enumerate(slots):
            self.widths[slot] = widths[place] if self._text else program.columns
            self._masked[slot] = self._text and masked[place]
        return step

    def run(self, segment: int, slots: list[int]) -> Step:
        """Run a later segment on up to `max_rows` examples.

        Args:
            segment: 0-based, the one after the segment that they have been through.
            slots: of the examples.
        """
        widths = [self.widths[slot] for slot in slots]
        width, padded = max(widths), False
        if self._text:
            width = self._rounded(width)
            padded = min(widths) < width or any(self._masked[slot] for slot in slots)
        with torch.inference_mode(False), torch.no_grad(), _on(self.device):
            step, _ = self._launch(segment, slots, width, padded, {})
        for slot in slots:
            self._reach[slot] = max(self._reach[slot], width)
        return step

    def release(self, slots: list[int]) -> None:
        """Give back the slots of examples that exit or are dropped; after the last of several segments too."""
        self.free.extend(slots)

    def release_all(self) -> None:
        """Give back all slots."""
        self.free = list(range(len(self.widths) - 1, 1, -1))

    def fastest_rows(self, segment: int, width: int) -> int:
        """The smallest number of rows, up to `max_rows`, beyond which the time per example hardly falls.

        Measured once, by static programs on slots of no example.

        Args:
            segment: 0-based, not the first; examples have been started before.
            width: tokens of the longest example.
        """
        width = self._rounded(width) if self._text else width
        if (segment, width) not in self._sizes:

            def seconds(rows: int) -> float:
                self._indices.zero_()
                program = _Program(segment, rows, width, padded=self._text)
                return seconds_of(partial(self._compute, program), self.graphs if self._captures(program) else None)

            with torch.inference_mode(False), torch.no_grad(), _on(self.device):
                self._sizes[segment, width] = fastest_size(seconds, self.max_rows, min(32, self.max_rows))
        return self._sizes[segment, width]

    def nbytes(self) -> int:
        """Bytes of the static tensors."""
        held = [value for inputs in self._inputs.values() for value in inputs.values()]
        held += [*self._numbers, *(self._rows.tensors() if self._rows is not None else ())]
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))

    # On the host

    def _rounded(self, width: int) -> int:
        """The number of columns of a program that holds so many tokens."""
        return rounded_length(width, self.model.config.max_input_length) if self.static else width

    def _take(self, count: int) -> list[int]:
        if count > len(self.free):
            self._add_slots(max(self.num_slots, count))
        taken, self.free = self.free[-count:], self.free[:-count]
        return taken[::-1]

    def _add_slots(self, count: int) -> None:
        before = max(len(self.widths), 2)
        after = before + count
        more, policy = after - len(self.widths), self.decisions.policy
        self.widths += [0] * more
        self._masked += [False] * more
        self._reach += [0] * more
        self._policies += [policy] * more
        self.free = [*range(after - 1, before - 1, -1), *self.free]
        if policy is not None:
            kept = (self.decisions.thresholds, self.decisions.temperatures)
            numbers = tuple(kind.repeat(after, 1) for kind in kept if kind is not None)
            for new, old in zip(numbers, self._numbers, strict=False):
                new[: len(old)] = old
            self._numbers = numbers
        if self._rows is not None:
            self._make_room(self._rows)

    def _set_policies(self, slots: list[int], policies: list[ExitPolicy] | None) -> None:
        policies = policies or [self.decisions.policy] * len(slots)
        changed = [n for n, slot in enumerate(slots) if self._policies[slot] is not policies[n]]
        if not changed:
            return
        indices = send([slots[n] for n in changed], self.device)
        for name, numbers in zip(("thresholds", "temperatures"), self._numbers, strict=False):
            values = [list(getattr(policies[n], name)) for n in changed]
            numbers.index_copy_(0, indices, send(values, self.device, numbers.dtype))
        for n in changed:
            self._policies[slots[n]] = policies[n]

    def _captures(self, program: _Program) -> bool:
        return self.graphs is not None and self._tensors.can_capture(program.padded)

    def _launch(
        self, segment: int, slots: list[int], width: int | None, padded: bool, inputs: dict
    ) -> tuple[Step, _Program]:
        count, self.changed = len(slots), False
        if self.static:
            program = self._program(segment, row_bucket(count, self.max_rows), width, padded, inputs)
            self._indices[:count].copy_(send(slots, self.device), non_blocking=True)
            self._indices[count : program.rows].zero_()
            fill_inputs(program.inputs, inputs, count, self.model.config)
        else:
            self._indices = torch.tensor(slots, device=self.device)
            program = _Program(segment, count, width, padded, on_device(inputs, self.device))
        if segment == 0 and self._text and len(self.exits) > 1:
            self._clear(slots, width)
        if program.graph is not None:
            self.changed = True
            program.graph.replay()
        else:
            self._compute(program)
        logits = program.logits[:count]
        step = Step(self.exits[segment], slots, logits.clone() if self.static else logits)
        if segment + 1 < len(self.exits):
            step._exits = program.exits.clone() if self.static else program.exits
            if self.device.type == "cuda":
                step._exits = torch.empty(len(program.exits), dtype=torch.bool, pin_memory=True)
                step._exits.copy_(program.exits, non_blocking=True)
                step._event = torch.cuda.Event()
                step._event.record()
        return step, program

    def _program(self, segment: int, rows: int, width: int | None, padded: bool, inputs: dict) -> _Program:
        """The static program for these numbers, captured before it is first used."""
        if not self._tensors.are_current():
            self._tensors, self._programs = ModelTensors(self.model), OrderedDict()
        length = inputs["attention_mask"].shape[1] if "attention_mask" in inputs else 0
        shapes = input_shapes(inputs, length, width)
        key = (segment, rows, width, padded, autocast_dtype(self.device), shapes)
        program = self._programs.get(key)
        if program is None:
            program = _Program(segment, rows, width, padded, self._static_inputs(shapes))
            if self._captures(program):
                # What runs before the capture must change no example.
                self._indices.zero_()
                program.graph = capture(partial(self._compute, program), *self.graphs)
            self._programs[key] = program
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        if shapes:
            self._inputs.move_to_end(shapes)
        return program

    def _static_inputs(self, shapes: tuple) -> dict:
        """Tensors that inputs of one shape are copied to; programs of other numbers of rows read the same."""
        if not shapes:
            return {}
        if shapes not in self._inputs:
            self._inputs[shapes] = static_inputs(shapes, self.max_rows, self.device)
            if len(self._inputs) > MAX_LANES:
                dropped, _ = self._inputs.popitem(last=False)
                self._programs = OrderedDict((k, p) for k, p in self._programs.items() if k[-1] != dropped)
        return self._inputs[shapes]

    # On the device

    def _clear(self, slots: list[int], width: int) -> None:
        """Set the columns behind those of new texts to zero, with their mask: others may have left numbers there."""
        reach = max(self._reach[slot] for slot in slots)
        if reach > width:
            for tensor in _per_token(self._rows):
                tensor[:, width:reach].index_fill_(0, self._indices[: len(slots)], 0)
        for slot in slots:
            self._reach[slot] = width

    def _compute(self, program: _Program) -> None:
        """Run a segment on the slots in `_indices`: all of this is captured."""
        model, segment = self.model, program.segment
        slots, mask = self._indices[: program.rows], None
        with autocast_here(self.device)() if self.static else nullcontext():
            if segment == 0:
                inputs = first_rows(program.inputs, program.rows)
                mask = inputs.pop("attention_mask", None)
                if program.padded:
                    inputs["attention_mask"] = mask
                examples = replace(model.embed(**inputs), padded=program.padded or None)
            else:
                examples = self._columns(program.width, program.padded).select(slots)
            numbers = [kind.index_select(0, slots) for kind in self._numbers]
            numbers = (*numbers, None)[:2] if numbers else None
            examples, *answers = self.decisions.run(segment, examples, model.run_stage, numbers)
        program.keep(*answers)
        program.columns = examples.hidden.shape[1]
        if segment + 1 < len(self.exits):
            if mask is not None:
                examples = replace(examples, attention_mask=(mask != 0).long())
            self._write(slots.clamp(min=_WRITTEN), examples, segment)

    def _columns(self, width: int, padded: bool) -> Examples:
        """The first columns of all slots."""
        if (width, padded) not in self._views:
            self._views[width, padded] = self._rows.trim(width, padded)
        return self._views[width, padded]

    def _write(self, targets: torch.Tensor, examples: Examples, segment: int) -> None:
        rows, width = self._rows, examples.hidden.shape[1]
        self.changed = True
        if segment == 0:
            dtypes = [tensor.dtype for tensor in examples.tensors()]
            if rows is None or width > rows.hidden.shape[1] or dtypes != [tensor.dtype for tensor in rows.tensors()]:
                self._make_room(examples)
                rows = self._rows
            wide = zip(_per_token(rows), _per_token(examples), strict=True)
            narrow = zip(_per_example(rows), _per_example(examples), strict=True)
        else:  # the rest stays as it is
            wide = ((rows.hidden, examples.hidden),)
            narrow = zip(_of_exit(rows), _of_exit(examples), strict=True)
        for kept, tensor in wide:
            kept[:, :width].index_copy_(0, targets, tensor)
        for kept, tensor in narrow:
            kept.index_copy_(0, targets, tensor)

    def _make_room(self, examples: Examples) -> None:
        """Make tensors for rows like these; what the slots hold stays."""
        before, width, number = self._rows, examples.hidden.shape[1], len(self.widths)
        if before is not None:
            width = max(width, before.hidden.shape[1])
        if self._text and (self.static or before is not None):
            longest = self.model.config.max_input_length or 2 * width
            width = max(width, min(1 << (width - 1).bit_length(), longest))
        wide = {id(tensor) for tensor in _per_token(examples)}

        def room(tensor: torch.Tensor) -> torch.Tensor:
            shape = (number, width, *tensor.shape[2:]) if id(tensor) in wide else (number, *tensor.shape[1:])
            return tensor.new_zeros(shape)

        self._rows = replace(examples.map(room), padded=None)
        if before is not None:
            for kept, old in zip(_per_token(self._rows), _per_token(before), strict=True):
                kept[: len(old), : old.shape[1]] = old
            for kept, old in zip(_per_example(self._rows), _per_example(before), strict=True):
                kept[: len(old)] = old
        self._programs.clear()
        self._views.clear()


class SlotsByShape(dict):
    """The slots of images by their shape, made at first use: nothing masks what would have to be filled up.

    Texts share theirs, under `None`. Of more than `MAX_SHAPES` shapes, those without an example in flight are dropped.

    Args:
        make: makes slots.
    """

    def __init__(self, make: Callable[[], Slots]):
        super().__init__()
        self._make = make

    def __missing__(self, shape: tuple | None) -> Slots:
        if len(self) >= MAX_SHAPES:
            for idle in [shape for shape, slots in self.items() if not slots.num_in_flight]:
                del self[idle]
        self[shape] = self._make()
        return self[shape]

    @property
    def num_in_flight(self) -> int:
        """Examples that have a slot."""
        return sum(slots.num_in_flight for slots in self.values())


def _per_token(examples: Examples) -> list[torch.Tensor]:
    wide = (examples.hidden, examples.attention_mask, *examples.per_token.values())
    return [tensor for tensor in wide if tensor is not None]


def _of_exit(examples: Examples) -> tuple[torch.Tensor, ...]:
    """What an exit leaves to the next."""
    return examples.state if examples.logits is None else (examples.logits, *examples.state)


def _per_example(examples: Examples) -> list[torch.Tensor]:
    return [*examples.per_example.values(), *_of_exit(examples)]


def _measure(mask: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Of each row of a mask (batch, length): the last column that is used, counted from 1, and whether some before
    it are masked. A row that masks everything uses all of it."""
    used = mask.cpu().numpy() != 0
    if used.all():
        return [used.shape[1]] * len(used), [False] * len(used)
    widths = (used * np.arange(1, used.shape[1] + 1)).max(1)
    widths[widths == 0] = used.shape[1]
    return widths.tolist(), (used.sum(1) < widths).tolist()


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
