"""Look-aheads for batches with repeating shapes, as programs on static tensors: on CUDA as two graphs each.

On other devices a program runs the same functions on the same tensors. The first graph contains the passes with
gradients, the second the derivative along u; between them the host restores the random state, so that both draw the
same masks.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ...inference.programs import capture
from .scopes import random_fork, random_state


if TYPE_CHECKING:
    from .look_ahead import LookAhead, OneStepAhead


logger = logging.get_logger(__name__)

# Beyond this number, the least recently used are dropped.
MAX_PROGRAMS = 32


class Programs:
    """The programs of a look-ahead, created when a shape occurs for the second time.

    Graphs are captured again if the memory of parameters, or of their state in the optimizer, has been replaced. All
    share one pool of memory, since no two run at the same time.
    """

    def __init__(self, look_ahead: "LookAhead"):
        self.look_ahead = look_ahead
        self._seen: set[tuple] = set()
        self._programs: OrderedDict[tuple, _Program] = OrderedDict()
        self._held: list[torch.Tensor] = []
        self._directions: dict[tuple, list[torch.Tensor]] = {}
        self._obstacle: str | None = None
        self.pool = self.stream = None

    def find(self, train: dict, meta: dict) -> "_Program | None":
        """The program for these parts; `None` if their shapes are new, or if no graph can be captured."""
        obstacle = self._find_obstacle()
        if obstacle:
            if obstacle != self._obstacle:
                logger.warning("--meta_cuda_graphs has no effect here: %s.", obstacle)
            self._obstacle = obstacle
            return None
        held = self._tensors()
        if [tensor.data_ptr() for tensor in held] != [tensor.data_ptr() for tensor in self._held]:
            self._programs.clear()
            self._directions.clear()
            # While graphs read these tensors, their memory must not be reused.
            self._held = [tensor.detach() for tensor in held]
        shapes = tuple(map(_shapes_of, (train, meta)))
        if shapes not in self._seen:
            self._seen.add(shapes)
            return None
        groups = self.look_ahead.trainer.optimizer.param_groups
        settings = tuple((group["weight_decay"], group["betas"], group["eps"]) for group in groups)
        key = shapes, tuple(self.look_ahead.shares(len(meta["labels"]))), settings
        if key not in self._programs:
            self._programs[key] = _Program(self, train, meta)
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _find_obstacle(self) -> str | None:
        trainer = self.look_ahead.trainer
        groups, args = trainer.optimizer.param_groups, trainer.args
        if self.look_ahead.method() != "forward":
            return "--meta_gradient is not `forward`"
        if not all(group.get("fused") and group["betas"][0] > 0 for group in groups):
            return "--optim is not adamw_torch_fused"
        if trainer.accelerator.scaler is not None:
            return "--fp16 scales its loss"
        if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
            return "--gradient_checkpointing computes again in the backward pass"
        return self._obstacle if self._obstacle and self._obstacle.startswith("the capture failed") else None

    def fail(self, error: Exception) -> None:
        """Create no more programs."""
        self._programs.clear()
        self._obstacle = f"the capture failed, {type(error).__name__}: {error}"
        logger.warning("--meta_cuda_graphs: look-aheads go on without graphs, because %s", self._obstacle)

    def _tensors(self) -> list[torch.Tensor]:
        trainer = self.look_ahead.trainer
        states = (state.values() for state in trainer.optimizer.state.values())
        kept = [entry for entries in states for entry in entries if isinstance(entry, torch.Tensor)]
        return [*trainer.network.parameters(), *trainer.network.buffers(), *trainer.weight_network.parameters(), *kept]

    def direction(self, found: "OneStepAhead") -> list[torch.Tensor]:
        """Tensors for the direction, one set for all programs that change the same parameters."""
        names = tuple(found.parameters)
        if names not in self._directions:
            self._directions[names] = list(map(torch.empty_like, found.direction))
        return self._directions[names]


def _shapes_of(part: dict) -> tuple:
    return tuple(
        (name, (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value)
        for name, value in part.items()
    )


class _Program:
    """One look-ahead on static copies of its parts, which every run overwrites first."""

    def __init__(self, programs: Programs, train: dict, meta: dict):
        self.programs, self.look_ahead = programs, programs.look_ahead
        self.device = self.look_ahead.trainer.args.device
        self.parts = [
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in part.items()}
            for part in (train, meta)
        ]
        groups = self.look_ahead.trainer.optimizer.param_groups
        self.rates = [torch.zeros((), device=self.device) for _ in groups]
        self.graphs: dict = {}
        self.found: OneStepAhead | None = None

    def run(self, train: dict, meta: dict) -> "OneStepAhead | None":
        """The results of `LookAhead.look` and the derivative, which are valid until the next run of any program.

        `None` if no graph could be captured.
        """
        for static, part in zip(self.parts, (train, meta), strict=True):
            for name, value in part.items():
                if isinstance(value, torch.Tensor):
                    static[name].copy_(value, non_blocking=True)
        for rate, group in zip(self.rates, self.look_ahead.trainer.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        masks = random_state(self.device)
        if not self._go(self._look):
            return None
        if self.found.direction is not None:
            with random_fork(self.device, masks):
                if not self._go(self._differentiate):
                    return None
        return self.found

    def _go(self, function) -> bool:
        if self.device.type != "cuda":
            function()
            return True
        name, programs = function.__name__, self.programs
        if name not in self.graphs:
            if programs.pool is None:
                programs.pool, programs.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
            try:
                with random_fork(self.device):
                    self.graphs[name] = capture(function, programs.pool, programs.stream)
            except RuntimeError as error:
                programs.fail(error)
                return False
        self.graphs[name].replay()
        return True

    def _look(self) -> None:
        found = self.look_ahead.look(*self.parts, rates=self.rates)
        found.losses, found.exit_logits = found.losses.detach(), found.exit_logits.detach()
        found.meta_loss = found.meta_loss.detach()
        if found.direction is not None:
            direction = self.programs.direction(found)
            torch._foreach_copy_(direction, found.direction)
            found.direction = direction
        self.found = found

    def _differentiate(self) -> None:
        train, found = self.parts[0], self.found
        found.derivative = self.look_ahead.forward_derivative(train, found.parameters, found.direction)
