"""The gradient of the meta loss with respect to the weights of samples, one optimizer step ahead."""

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from ...models.exit_losses import reduce_losses
from .charging import ExitForward, charged_shares
from .forward_mode import FewKernels
from .programs import Programs
from .scopes import float32_precision, random_fork, random_state, replaced, stand_ins
from .step import linear_step


if TYPE_CHECKING:
    from .trainer import MetaWeightedExitTrainer


# Kinds of attention that have forward-mode derivatives and double backward.
DIFFERENTIABLE = ("eager", "sdpa")


def halve(inputs: dict) -> tuple[dict, dict]:
    """Divide a batch into two halves; the first is the smaller one, and empty if there is only one sample."""
    size = len(inputs["labels"])

    def part(rows: slice) -> dict:
        in_rows = {n for n, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape[:1] == (size,)}
        return {name: value[rows] if name in in_rows else value for name, value in inputs.items()}

    return part(slice(size // 2)), part(slice(size // 2, size))


def _lay_out(gradients: list[torch.Tensor], parameters: list[nn.Parameter]) -> None:
    """Copy gradients that share memory with an earlier one, or have another memory layout than their parameter.

    Two gradients of ViT's embeddings share memory for a batch of one. Operations on many tensors need equal layouts.
    """
    taken = set()
    for n, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        storage = gradient.untyped_storage().data_ptr()
        if storage in taken or gradient.stride() != parameter.stride():
            gradients[n] = torch.empty_like(parameter).copy_(gradient)
        taken.add(storage)


def _as_their_parameters(gradients: Iterable[torch.Tensor], parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """`gradients` in the types of their parameters; all conversions are one operation."""
    gradients = list(gradients)
    places = [n for n, parameter in enumerate(parameters) if gradients[n].dtype != parameter.dtype]
    if places:
        copies = [torch.empty_like(parameters[n]) for n in places]
        torch._foreach_copy_(copies, [gradients[n] for n in places])
        for n, copy in zip(places, copies, strict=True):
            gradients[n] = copy
    return gradients


@dataclass
class OneStepAhead:
    """The results of the passes of a look-ahead.

    Args:
        losses: l of the train part, (n, K).
        exit_logits: logits of the train part, (n, K, num_labels).
        parameters: the parameters that the step changes, by name.
        direction: u without c, one tensor per parameter; `None`: the meta loss depends on none of them.
        clip: c.
        meta_loss: L_meta.
        derivative: <grad l, u>, (n, K), if it is known already.
    """

    losses: torch.Tensor
    exit_logits: torch.Tensor
    parameters: dict[str, nn.Parameter]
    direction: list[torch.Tensor] | None
    clip: torch.Tensor | float
    meta_loss: torch.Tensor | None = None
    derivative: torch.Tensor | None = None


class LookAhead:
    """Computes how the meta loss would change with the weights of samples, if the optimizer's next step used them.

    Args:
        trainer: the trainer, with the model, the optimizer, the weight network and the settings.
    """

    step_norm = 0.01  # length h * ||u|| of a step of the central differences

    def __init__(self, trainer: "MetaWeightedExitTrainer"):
        self.trainer = trainer
        self.share_offset = 0.0  # u of `charged_shares`, drawn at each look-ahead
        self._linear: set[int] | None = None  # parameters that one linear layer alone has, by id; `None`: not known
        self.programs = Programs(self) if trainer.scheme_args.meta_cuda_graphs else None

    def gradient(self, train: dict, meta: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look one step ahead on the train part, and evaluate this step on the meta part.

        Args:
            train: model inputs and labels of the train part.
            meta: model inputs and labels of the meta part.

        Returns:
            w of the train part, (n, K), with its graph through W; dL_meta/dw, (n, K); L_meta.
        """
        method, self._linear = self.method(), None
        # The rounding of TF32 is larger than a change of 1e-6 in a parameter.
        with float32_precision(None if method == "forward" else "ieee"):
            if method == "exact":
                with sdpa_kernel(SDPBackend.MATH):
                    return self._exact_gradient(train, meta)
            return self._estimated_gradient(train, meta, forward=method == "forward")

    def method(self) -> str:
        """The value of `--meta_gradient`, with `auto` replaced by the method for this device."""
        method, kernel = self.trainer.scheme_args.meta_gradient, self.trainer.network.config._attn_implementation
        if method == "auto":
            plain = self.trainer.args.device.type == "cpu" or kernel not in DIFFERENTIABLE
            method = "directional" if plain else "forward"
        return method

    def _estimated_gradient(self, train, meta, forward: bool):
        program = self.programs and self.programs.find(train, meta)
        found = program and program.run(train, meta)
        if found is None:
            masks = random_state(self.trainer.args.device)
            found = self.look(train, meta, masks=None if forward else masks)
            if forward and found.direction is not None:
                with random_fork(self.trainer.args.device, masks):
                    found.derivative = self.forward_derivative(train, found.parameters, found.direction)
        weights = self._weights_of(found)
        if found.derivative is None:
            return weights, torch.zeros_like(weights), found.meta_loss.detach()
        derivative, scaler = found.derivative, self._scaler()
        if scaler is not None:
            derivative = derivative / scaler.scale(torch.ones_like(found.meta_loss))
        gradient = found.clip * self.trainer.exit_loss_weights.to(weights) * derivative / -len(derivative)
        # In half precision a gradient may overflow; then the training step is skipped too.
        gradient = torch.where(gradient.isfinite().all(), gradient, 0)
        return weights, gradient, found.meta_loss.detach()

    def look(self, train: dict, meta: dict, masks: list | None = None, rates: list | None = None) -> OneStepAhead:
        """Both passes with gradients: through theta on the train part, through theta' on the meta part.

        Args:
            train: part a.
            meta: part b.
            masks: random state of the train pass; if given, the derivative along u is computed by central differences.
            rates: learning rates of the optimizer's groups, instead of its own.

        Returns:
            the results of both passes.
        """
        # At the peak there are two sets of tensors more than in joint training: `ahead` and `direction`.
        attention, scaler = nullcontext(), self._scaler()
        if masks is None and self._drops_attention:
            attention = sdpa_kernel(SDPBackend.MATH)  # with other kernels the derivative would draw other masks
        with attention:
            found, _ = self.train_pass(train)
        parameters, direction = list(found.parameters.values()), found.direction
        _lay_out(direction, parameters)
        with stand_ins(parameters) as (values, ahead):
            # u = c P grad L_meta; c comes last. Where g is exactly zero, part a does not use the parameter, and what u
            # is there changes nothing, except that it would take its part of ||u||.
            linear_step(self.trainer.optimizer, parameters, values, direction, ahead, found.clip, rates)
            with self._leaves(parameters) as leaves:
                found.meta_loss = self.meta_loss(meta)
                if not found.meta_loss.requires_grad:  # all samples are charged at an exit that is frozen
                    found.direction = None
                    return found
                scaled = found.meta_loss if scaler is None else scaler.scale(found.meta_loss)
                slopes = torch.autograd.grad(scaled, leaves, materialize_grads=True)
            torch._foreach_mul_(direction, _as_their_parameters(slopes, parameters))
            if masks is not None:
                found.derivative = self.central_differences(train, values, direction, ahead, masks)
        return found

    def _scaler(self):
        return self.trainer.accelerator.scaler if self.method() == "forward" else None

    def _weights_of(self, found: OneStepAhead) -> torch.Tensor:
        """w, with its graph through W."""
        return self.trainer.weight_network(found.losses.detach(), found.exit_logits.detach())

    @cached_property
    def _drops_attention(self) -> bool:
        """Whether the attention of the model was built with dropout; `True` if the config does not say."""
        config = self.trainer.network.config.to_dict()
        rates = [rate for name, rate in config.items() if "att" in name and "drop" in name]
        return any(rates) or not rates

    @torch.no_grad()
    def central_differences(self, train, values, direction, ahead, masks) -> torch.Tensor:
        """(l(theta + h u) - l(theta - h u)) / 2h, (n, K); `ahead` are the tensors that the parameters use now."""
        norm = get_total_norm(direction).item()
        if not 0 < norm < math.inf:
            return self._losses(train)[0] * 0
        h, sides = self.step_norm / norm, []
        for sign in (1, -1):
            for value, part, moved in zip(values, direction, ahead, strict=True):
                torch.add(value, part, alpha=sign * h, out=moved)
            with random_fork(self.trainer.args.device, masks):
                sides.append(self._losses(train)[0])
        return (sides[0] - sides[1]) / (2 * h)

    @torch.no_grad()
    def forward_derivative(self, train, named: dict, direction) -> torch.Tensor:
        """<grad l, u>, (n, K), in one forward pass over pairs of values and their derivatives along u."""
        # Scaled to a size that half precision can represent: a mean square of 2^-10 per parameter.
        size = sum(part.numel() for part in direction)
        scale = get_total_norm(direction).clamp(min=torch.finfo(torch.float32).tiny) * (32 / size**0.5)
        torch._foreach_div_(direction, scale)
        parameters = list(named.values())
        values = self._cast_of_linear(parameters, [parameter.detach() for parameter in parameters])
        direction = self._cast_of_linear(parameters, direction)
        # In half precision attention alone multiplies in float32.
        half = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
        precision = float32_precision("tf32" if half else None)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FewKernels(), precision:
            pairs = {
                f"network.{name}": forward_ad.make_dual(value, part)
                for name, value, part in zip(named, values, direction, strict=True)
            }
            tangent = forward_ad.unpack_dual(self._losses(train, pairs)[0]).tangent
            return tangent * scale

    @contextmanager
    def _leaves(self, parameters: list[nn.Parameter]):
        """Let the network use leaves instead of `parameters`; those of linear layers are cast once for a pass."""
        cast = self._cast_of_linear(parameters, [parameter.detach() for parameter in parameters])
        pairs = list(zip(parameters, cast, strict=True))
        leaves = [p if tensor.dtype == p.dtype else tensor.requires_grad_() for p, tensor in pairs]
        with replaced(self.trainer.network, {id(p): leaf for p, leaf in zip(parameters, leaves, strict=True)}):
            yield leaves

    def _cast_of_linear(self, parameters, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """`tensors`, with those of linear layers in autocast's type; all conversions are one operation."""
        with self._precision():
            kind = self.trainer.args.device.type
            if not torch.is_autocast_enabled(kind):
                return tensors
            dtype = torch.get_autocast_dtype(kind)
        if self._linear is None:  # they are looked for once in a look-ahead, which asks for them several times
            modules = list(self.trainer.network.modules())
            users = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
            linear = (module._parameters.values() for module in modules if type(module) is nn.Linear)
            self._linear = {id(part) for parts in linear for part in parts if users[id(part)] == 1}
        places = [n for n, part in enumerate(parameters) if id(part) in self._linear]
        cast = [torch.empty_like(tensors[n], dtype=dtype) for n in places]
        if places:
            torch._foreach_copy_(cast, [tensors[n] for n in places])
        of_place = dict(zip(places, cast, strict=True))
        return [of_place.get(n, tensor) for n, tensor in enumerate(tensors)]

    def _exact_gradient(self, train, meta):
        found, leaf = self.train_pass(train, create_graph=True)
        parameters, gradients = found.parameters, found.direction
        constants = [part.detach() for part in gradients]
        slopes = [part.clone() for part in constants]
        values = [parameter.detach() for parameter in parameters.values()]
        ahead = [torch.empty_like(value) for value in values]
        linear_step(self.trainer.optimizer, list(parameters.values()), values, slopes, ahead, found.clip)
        # The value is theta', the derivative -c P.
        moved = {
            f"network.{name}": value - slope * found.clip * (part - constant)
            for name, value, slope, part, constant in zip(parameters, ahead, slopes, gradients, constants, strict=True)
        }
        meta_loss, weights = self.meta_loss(meta, moved), self._weights_of(found)
        if not meta_loss.requires_grad:
            return weights, torch.zeros_like(weights), meta_loss
        return weights, torch.autograd.grad(meta_loss, leaf, materialize_grads=True)[0], meta_loss.detach()

    def train_pass(self, train: dict, create_graph: bool = False) -> tuple[OneStepAhead, torch.Tensor]:
        """l and g of the train part, with g in the field `direction`; and w as a leaf."""
        scaler, named = self._scaler(), self.trainer.network.named_parameters()
        trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
        with self._leaves(list(trainable.values())) as leaves:
            losses, exit_logits = self._losses(train)
            with torch.no_grad():
                leaf = self.trainer.weight_network(losses.detach(), exit_logits.detach())
            leaf.requires_grad_(create_graph)
            loss = reduce_losses(losses, self.trainer.exit_loss_weights.to(losses) * leaf)
            loss = loss if scaler is None else scaler.scale(loss)
            gradients = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
        # A parameter without gradient is left alone by the optimizer, decay included.
        reached = {name: part for name, part in zip(trainable, gradients, strict=True) if part is not None}
        parts = _as_their_parameters(reached.values(), [trainable[name] for name in reached])
        reached = dict(zip(reached, parts, strict=True))
        if scaler is not None:
            torch._foreach_div_(list(reached.values()), scaler.scale(torch.ones_like(loss)))
        clip, limit = 1.0, self.trainer.args.max_grad_norm
        if limit and limit > 0:
            norm = get_total_norm([part.detach() for part in reached.values()])
            clip = (limit / (norm + 1e-6)).clamp(max=1.0)
        # An optimizer of one's own may hold some of the parameters only. The norm is of all.
        held = {id(parameter) for group in self.trainer.optimizer.param_groups for parameter in group["params"]}
        stepped = {name: trainable[name] for name in reached if id(trainable[name]) in held}
        direction = [reached[name] for name in stepped]
        return OneStepAhead(losses, exit_logits, stepped, direction, clip), leaf

    @contextmanager
    def _precision(self):
        """The training's own for `forward`, else full float32."""
        with torch.autocast(self.trainer.args.device.type, enabled=False):
            if self.method() != "forward":
                yield
            else:
                # Without the cache of cast parameters: it would outlive a change of their values.
                with self.trainer.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                    yield

    def outputs(self, inputs: dict, parameters: dict | None = None, shares: list[int] | None = None):
        """What `ExitForward` gives, at `parameters` where given."""
        network = ExitForward(self.trainer.network)
        with self._precision():
            if parameters is None:
                return network(inputs, shares)
            return functional_call(network, parameters, (inputs, shares))

    def _losses(self, inputs: dict, parameters: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """l (n, K) and the logits (n, K, num_labels) of `inputs`, at `parameters` where given."""
        exit_logits = self.outputs(inputs, parameters)
        return self.trainer.losses_of(exit_logits, inputs["labels"]), exit_logits

    def meta_loss(self, inputs: dict, parameters: dict | None = None) -> torch.Tensor:
        labels = inputs["labels"]
        shares = self.shares(len(labels))
        logits, ids = self.outputs(inputs, parameters, shares)
        losses = self.trainer.losses_of(logits.unsqueeze(1), labels[ids]).squeeze(1)
        return torch.stack([part.mean() for part in losses.split(shares) if len(part)]).sum()

    def shares(self, num_samples: int) -> list[int]:
        """How many of so many samples are charged at each exit, in this look-ahead."""
        trainer = self.trainer
        return charged_shares(
            num_samples, trainer.network.num_exits, trainer.scheme_args.meta_target_p, self.share_offset
        )
