"""Meta-weighted training: a small network learns how much each sample counts at each exit.

Symbols: l[i,k] is the loss of sample i at exit k and w[i,k] its weight; K the number of exits; theta the parameters
of the network, W the weight prediction network; g the clipped gradient of the weighted loss, and P how far the
optimizer's step moves theta per unit of g.
"""

import inspect
import json
import math
import os
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm, skip_init
from torch.optim.adamw import adamw
from transformers import get_scheduler
from transformers.utils import logging

from ..models import ExitConfigurationError
from ..models.exit_losses import reduce_losses
from .checkpoints import reading_checkpoint
from .forward_mode import FewKernels
from .trainer import EarlyExitTrainer, register_scheme


logger = logging.get_logger(__name__)

STATE_FILE = "weight_network.pt"
WEIGHT_MAP = "l2w_weights"
# Length h * ||u|| of a step of the central differences.
_STEP_NORM = 0.01
# Numbers of a piece, about: what a CPU keeps of each tensor in its cache.
_PIECE = 2**18
# Kinds of attention that have forward-mode derivatives and double backward.
_DIFFERENTIABLE = ("eager", "sdpa")
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def _on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _setting(default, text: str):
    return field(default=default, metadata={"help": f"l2w: {text}."})


@dataclass
class MetaWeightedArguments:
    """Settings of `--method l2w`; the defaults are the paper's for CIFAR."""

    wpn_hidden_size: int = _setting(500, "width of the weight prediction network")
    wpn_num_layers: int = _setting(1, "its number of hidden layers")
    meta_learning_rate: float = _setting(1e-4, "its learning rate (Adam)")
    meta_weight_decay: float = _setting(1e-4, "its weight decay")
    meta_lr_scheduler_type: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "its schedule: `cosine` (to zero), `linear` or `constant`"
    )
    meta_interval: int = _setting(1, "optimizer steps from one look-ahead to the next")
    meta_epsilon: float = _setting(0.8, "eps in w = 1 + eps * (g - mean(g)), from 0 to 1")
    meta_target_p: float = _setting(0.75, "q; the share of the meta half charged at exit k is proportional to q^k")
    meta_input: Literal["loss", "confidence", "both"] = _setting("loss", "what the network reads of each exit")
    meta_constraint: Literal["exit", "sample", "batch"] = _setting(
        "exit", "over what weights average 1: a sample's exits, an exit's samples, or all of the batch"
    )
    meta_gradient: Literal["auto", "forward", "directional", "exact"] = _setting(
        "auto",
        "`forward` (forward-mode differentiation, in the training's precision), `directional` (central differences, "
        "in float32), `exact` (double backward in float32, the slow reference) or `auto`: `forward` on accelerators, "
        "`directional` on the CPU",
    )

    def __post_init__(self):
        def check(name: str, holds: bool, wanted: str):
            if not holds:
                raise ExitConfigurationError(f"--{name} must be {wanted}, not {getattr(self, name)!r}.")

        for name in ("meta_lr_scheduler_type", "meta_input", "meta_constraint", "meta_gradient"):
            known = get_args(type(self).__annotations__[name])
            check(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("wpn_hidden_size", "wpn_num_layers", "meta_interval"):
            check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number from 1")
        for name in ("meta_learning_rate", "meta_target_p"):
            check(name, 0 < getattr(self, name) < math.inf, "above 0")
        check("meta_weight_decay", 0 <= self.meta_weight_decay < math.inf, "0 or above")
        check("meta_epsilon", 0 <= self.meta_epsilon <= 1, "between 0 and 1")


class WeightPredictionNetwork(nn.Module):
    """W: from what K exits say of a sample to its K weights, w = 1 + eps * (g - mean(g)).

    g is an MLP with ReLU and, at its end, tanh. `generator` draws its parameters (within the bounds of `nn.Linear`);
    the global random state does not advance.
    """

    def __init__(self, num_exits: int, args: MetaWeightedArguments, generator: torch.Generator):
        super().__init__()
        self.input = args.meta_input
        self.epsilon = args.meta_epsilon
        self.mean_over = {"exit": (1,), "sample": (0,), "batch": (0, 1)}[args.meta_constraint]
        num_inputs = num_exits * (2 if self.input == "both" else 1)
        sizes = [num_inputs, *[args.wpn_hidden_size] * args.wpn_num_layers, num_exits]
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            linear = skip_init(nn.Linear, fan_in, fan_out)
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, losses: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor:
        """w, (batch, K), from the losses (batch, K) and the logits (batch, K, num_labels)."""
        inputs = [] if self.input == "confidence" else [losses]
        if self.input != "loss":
            inputs.append(_confidences(exit_logits))
        predicted = self.layers(torch.cat(inputs, 1).float()).to(losses.dtype)
        return 1 + self.epsilon * (predicted - predicted.mean(self.mean_over, keepdim=True))


def _confidences(exit_logits: torch.Tensor) -> torch.Tensor:
    """The largest probability, of logits (..., num_labels)."""
    low = exit_logits.dtype in (torch.float16, torch.bfloat16)
    return exit_logits.softmax(-1, dtype=torch.float32 if low else None).amax(-1)


def charged_shares(num_samples: int, num_exits: int, target_p: float, offset: float) -> list[int]:
    """How many of the n samples of the meta half are charged at each exit: n_1 to n_K.

    n_k is n p_k with p_k proportional to q^k (Han et al., section 3.3), rounded systematically: n_1 + ... + n_k =
    floor(n (p_1 + ... + p_k) + u), so that with u uniform in [0, 1) the mean of n_k is n p_k. Rounded down, the middle
    exits of a small batch would never be charged.

    Args:
        num_samples: n.
        num_exits: K.
        target_p: q.
        offset: u.
    """
    powers = list(accumulate(target_p**k for k in range(1, num_exits + 1)))
    bounds = [math.floor(num_samples * power / powers[-1] + offset) for power in powers[:-1]]
    return [after - before for before, after in pairwise([0, *bounds, num_samples])]


def _most_confident_first(logits: torch.Tensor) -> torch.Tensor:
    """The order of the samples by confidence; of equally confident ones the earlier come first."""
    return _confidences(logits.detach()).argsort(descending=True, stable=True)


@torch.no_grad()
def linear_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.Tensor],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    ahead: list[torch.Tensor],
    clip: torch.Tensor | float = 1.0,
) -> None:
    """Make the step that AdamW or SGD would make, without touching its state.

    Args:
        optimizer: read only.
        parameters: those that have a gradient; they tell the optimizer's groups and states.
        values: theta.
        gradients: replaced by P: with the g^2 of AdamW held constant, theta' falls by P per unit of the clipped
            gradient g. P is 0 where g is exactly 0: a word row that no batch has had yet has AdamW's P at 1/eps.
        ahead: takes theta'.
        clip: g is this times `gradients`.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    for group in optimizer.param_groups:
        chosen = [places[id(parameter)] for parameter in group["params"] if id(parameter) in places]
        rows = [(optimizer.state.get(parameters[n], {}), values[n], gradients[n], ahead[n]) for n in chosen]
        for piece in _pieces(rows):
            states, *tensors = map(list, zip(*piece, strict=True))
            torch._foreach_mul_(tensors[1], clip)
            _step_of(group, states)(group, states, *tensors)


def _step_of(group: dict, states: list[dict]):
    if "betas" not in group:
        return _sgd_step
    readable = all(_on_host(state["step"]) for state in states if state)
    return _adamw_step if readable or group["betas"][0] == 0 else _fused_adamw_step


def _pieces(rows: list[tuple]):
    """`rows` of (state, *tensors), all at once; on a CPU in parts that stay in its cache through all of a step."""
    if not all(_on_host(tensor) and tensor.is_contiguous() for _, *tensors in rows for tensor in tensors):
        yield rows
        return
    ready, size = [], 0
    for row in rows:
        for part in _split(*row):
            ready.append(part)
            size += part[1].numel()
            if size >= _PIECE:
                yield ready
                ready, size = [], 0
    if ready:
        yield ready


def _split(state: dict, *tensors):
    if tensors[0].numel() <= _PIECE:
        yield state, *tensors
        return
    entries = {name: entry for name, entry in state.items() if name != "step" and entry is not None}
    parts = (tensor.reshape(-1).split(_PIECE) for tensor in (*entries.values(), *tensors))
    for part in zip(*parts, strict=True):
        yield {**state, **dict(zip(entries, part, strict=False))}, *part[len(entries) :]


def _adamw_state(states, values) -> list[list[torch.Tensor]]:
    """First and second moments, zeros where there are none yet."""
    return [
        [state[name] if state else torch.zeros_like(value) for state, value in zip(states, values, strict=True)]
        for name in ("exp_avg", "exp_avg_sq")
    ]


def _adamw_step(group, states, values, gradients, ahead) -> None:
    rate, (beta1, beta2) = float(group["lr"]), group["betas"]
    steps = [state["step"].item() + 1 if state else 1.0 for state in states]
    first, second = _adamw_state(states, values)
    rates = [rate / (1 - beta1**step) for step in steps]
    corrections = [1 - beta2**step for step in steps]

    slopes = torch._foreach_mul(second, [beta2 / correction for correction in corrections])
    torch._foreach_addcmul_(slopes, gradients, gradients, [(1 - beta2) / correction for correction in corrections])
    # The square root. On a CPU torch's own may take several times as long where it meets zeros.
    torch._foreach_rsqrt_(slopes)
    torch._foreach_reciprocal_(slopes)
    torch._foreach_add_(slopes, group["eps"])
    # No further set of tensors: `ahead` holds the first moment before it takes theta'.
    torch._foreach_copy_(ahead, first)
    torch._foreach_lerp_(ahead, gradients, 1 - beta1)
    torch._foreach_mul_(ahead, [-rate for rate in rates])
    torch._foreach_div_(ahead, slopes)
    torch._foreach_add_(ahead, values, alpha=1 - rate * group["weight_decay"])
    _mark_used(gradients)
    torch._foreach_mul_(gradients, [(1 - beta1) * rate for rate in rates])
    torch._foreach_div_(gradients, slopes)


def _fused_adamw_step(group, states, values, gradients, ahead) -> None:
    """By torch's own kernel, because the step counters are on the device, and reading them would wait for it."""
    beta1, beta2 = group["betas"]
    first, second = _adamw_state(states, values)
    steps = [state["step"] if state else values[0].new_zeros((), dtype=torch.float32) for state in states]

    def step(moved: list[torch.Tensor], first: list[torch.Tensor], weight_decay: float) -> None:
        adamw(
            moved,
            gradients,
            first,
            torch._foreach_add(second, 0),
            [],
            torch._foreach_add(steps, 0),
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=weight_decay,
        )

    torch._foreach_copy_(ahead, values)
    step(ahead, torch._foreach_add(first, 0), group["weight_decay"])
    # From 0 and with the first moment at 1 - b1 after the step, the kernel goes to -P.
    before = torch._foreach_mul(gradients, 1 - 1 / beta1)
    torch._foreach_add_(before, 1 / beta1 - 1)
    slopes = [torch.empty_like(value) for value in values]
    torch._foreach_zero_(slopes)
    step(slopes, before, 0.0)
    _mark_used(gradients)
    torch._foreach_neg_(gradients)
    torch._foreach_mul_(gradients, slopes)


def _sgd_step(group, states, values, gradients, ahead) -> None:
    rate, momentum = float(group["lr"]), group["momentum"]
    buffers = [state.get("momentum_buffer") if momentum else None for state in states]
    torch._foreach_copy_(ahead, values)
    for started in (False, True):
        rows = zip(buffers, gradients, ahead, strict=True)
        rows = [row for row in rows if (row[0] is not None) == started]
        if not rows:
            continue
        held, slopes, moved = map(list, zip(*rows, strict=True))
        slope, inertia = (1 - group["dampening"], momentum) if started else (1.0, 0.0)
        if group["nesterov"]:
            slope, inertia = 1 + momentum * slope, momentum * inertia
        torch._foreach_mul_(moved, 1 - rate * slope * group["weight_decay"])
        torch._foreach_add_(moved, slopes, alpha=-rate * slope)
        if started:
            torch._foreach_add_(moved, held, alpha=-rate * inertia)
        _mark_used(slopes)
        torch._foreach_mul_(slopes, rate * slope)


def _mark_used(gradients: list[torch.Tensor]) -> None:
    """Replace what is not exactly zero by 1."""
    torch._foreach_sign_(gradients)
    torch._foreach_abs_(gradients)


class _Forward(nn.Module):
    """The network without what accelerate wraps around it, under its own names behind `network.`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: dict, shares: list[int] | None = None):
        """Without `shares` the logits of all exits (n, K, num_labels).

        With them exit k answers the n_k most confident of the samples that are left, and they take no part in the
        layers behind: their logits (n, num_labels), exit by exit, and which samples they are (n,).
        """
        names = inspect.signature(self.network.embed).parameters
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        kwargs = {name: inputs.pop(name) for name in inputs.keys() - names.keys()}
        examples = self.network.embed(**inputs)
        mask, on_host = examples.attention_mask, _on_host(examples.hidden)
        self.network.check_mask(mask, dynamic=False)
        of_tokens = mask is not None and mask.dim() == 2
        if of_tokens and on_host:
            examples = examples.unpadded()
        elif of_tokens:
            examples.padded = True  # to look would be to wait
        if shares is None:
            return torch.stack(self.network.run_all(examples, **kwargs), 1)

        examples.ids = torch.arange(len(examples), device=examples.hidden.device)
        context, after, answers, ids = self.network.make_context(examples), -1, [], []
        for index, share in enumerate(shares):
            if share == 0:
                continue
            hidden, logits = self.network.run_stage(index, examples, context, None, after, **kwargs)
            if share == len(examples):
                break
            examples, order = replace(examples, hidden=hidden), _most_confident_first(logits)
            charged, left = order[:share], order[share:]
            answers.append(logits.index_select(0, charged))
            ids.append(examples.ids.index_select(0, charged))
            if of_tokens and on_host:
                exits = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, charged, True)
                examples = examples.trim(*examples.measure(exits)[1:])
            examples = examples.select(left)
            context, after = self.network.make_context(examples), index
        return torch.cat([*answers, logits]), torch.cat([*ids, examples.ids])


@contextmanager
def _stand_ins(parameters: list[nn.Parameter]):
    """Put new tensors in the place of the parameters' values, which come back at the end, whatever happened.

    Gives the values and the new tensors, which hold nothing yet.
    """
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = torch.empty_like(parameter)
        yield values, [parameter.data for parameter in parameters]
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def _lay_out(gradients: list[torch.Tensor], parameters: list[nn.Parameter]) -> None:
    """Copy what shares memory with an earlier one (at one row, so do two gradients of ViT's embeddings), and what does
    not lie in memory as its parameter does, which steps over many tensors at once ask for."""
    taken = set()
    for n, (gradient, parameter) in enumerate(zip(gradients, parameters, strict=True)):
        storage = gradient.untyped_storage().data_ptr()
        if storage in taken or gradient.stride() != parameter.stride():
            gradients[n] = torch.empty_like(parameter).copy_(gradient)
        taken.add(storage)


def _keys(ids: torch.Tensor, padding: int | None) -> torch.Tensor:
    """`ids` in an order that has the padding first."""
    return ids if padding is None else ids.masked_fill(ids == padding, -1)


def _distinct(ids: torch.Tensor, padding: int | None) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """The distinct `ids`: their keys in order, the ids themselves, the place of the padding.

    How many there are is known on the CPU only. Elsewhere the result has a fixed length: it has the padding in any
    case, and the last id again and again at the end.
    """
    keys = _keys(ids.flatten(), padding)
    if _on_host(ids):
        keys = keys.unique()
        place = 0 if padding is not None and keys[0] == -1 else None
    else:
        if padding is not None:
            keys = torch.cat([keys.new_full((1,), -1), keys])
        ordered = keys.sort().values
        places = (ordered.diff() != 0).cumsum(0)
        keys = ordered[-1:].repeat(len(ordered)).scatter_(0, places, ordered[1:])
        keys[:1] = ordered[:1]
        place = None if padding is None else 0
    return keys, keys if padding is None else keys.masked_fill(keys == -1, padding), place


@contextmanager
def _words_of(inputs: dict, network: nn.Module, optimizer: torch.optim.Optimizer):
    """Cut the word table, and the optimizer's state of it, to the rows that `inputs` look up; no other tells.

    The whole table comes back at the end, whatever happened. A table that another module uses too stays whole.
    """
    ids = inputs.get("input_ids")
    table = None if ids is None else network.get_input_embeddings()
    whole = table.weight if type(table) is nn.Embedding else None
    shared = sum(parameter is whole for _, parameter in network.named_parameters(remove_duplicate=False)) != 1
    if shared or (not _on_host(ids) and ids.numel() >= len(whole)):
        yield
        return
    padding = table.padding_idx
    keys, words, place = _distinct(ids, padding)
    few = nn.Parameter(whole.detach()[words], requires_grad=whole.requires_grad)
    state = optimizer.state.get(whole, {}).items()
    state = {name: entry[words] if name != "step" and entry is not None else entry for name, entry in state}
    places = [
        (group["params"], n) for group in optimizer.param_groups for n, p in enumerate(group["params"]) if p is whole
    ]
    hook = table.register_forward_pre_hook(lambda _, args: (torch.searchsorted(keys, _keys(args[0], padding)),))
    try:
        table.weight, table.padding_idx = few, place
        for parameters, n in places:
            parameters[n] = few
        if state:
            optimizer.state[few] = state
        yield
    finally:
        hook.remove()
        table.weight, table.padding_idx = whole, padding
        for parameters, n in places:
            parameters[n] = whole
        optimizer.state.pop(few, None)


@contextmanager
def _restored(tensors: list[torch.Tensor]):
    """Give copies of `tensors`, and put them back at the end, whatever happened."""
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, saved, strict=True):
                tensor.copy_(copy)


def _random_generators(device: torch.device) -> list:
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [generator.get_rng_state() for generator in _random_generators(device)]


@contextmanager
def _random_fork(device: torch.device, start: list[torch.Tensor] | None = None):
    """Run under the random state `start` (default: the present one), and go back to the present one afterwards."""
    present = _random_state(device)
    try:
        for generator, state in zip(_random_generators(device), start or present, strict=True):
            generator.set_rng_state(state)
        yield
    finally:
        for generator, state in zip(_random_generators(device), present, strict=True):
            generator.set_rng_state(state)


@contextmanager
def _float32_precision(matmul: str | None):
    """Convolutions of float32 in full float32, and matrix products in `matmul`: `ieee`, `tf32`, or `None` as it was.

    For convolutions of cuDNN TF32 is torch's default. What an operation reads is the setting of its own kind, in
    all versions of torch that have it; the older `allow_tf32` sets that one.
    """
    backends = torch.backends
    wanted = {backends.cudnn.conv: "ieee", backends.mkldnn.conv: "ieee"}
    if matmul is not None:
        wanted |= {backends.cuda.matmul: matmul, backends.mkldnn.matmul: matmul}
    before = {setting: setting.fp32_precision for setting in wanted}
    try:
        for setting, value in wanted.items():
            setting.fp32_precision = value
        yield
    finally:
        for setting, value in before.items():
            setting.fp32_precision = value


def _halve(inputs: dict) -> tuple[dict, dict]:
    """The batch in two; the first half is the smaller one, and empty if there is one sample only."""
    size = len(inputs["labels"])

    def part(rows: slice) -> dict:
        in_rows = {n for n, value in inputs.items() if isinstance(value, torch.Tensor) and value.shape[:1] == (size,)}
        return {name: value[rows] if name in in_rows else value for name, value in inputs.items()}

    return part(slice(size // 2)), part(slice(size // 2, size))


@register_scheme("l2w")
class MetaWeightedExitTrainer(EarlyExitTrainer):
    """A weight network W learns, by looking one step ahead, how much each sample counts at each exit.

    The network trains on sum_k mean_i w[i,k] l[i,k], with w = W(l) taken as a constant. Every `meta_interval`
    optimizer steps W learns first, from the step's first micro-batch: it is cut in halves a and b, and W is updated
    for (train a, meta b), then for (train b, meta a), both at the same theta:

        theta'(w) = the optimizer's step on a = theta - P g(w) + terms without w
        L_meta    = sum_k mean of l[j,k](theta') over the samples j of b charged at exit k (`charged_shares`)
        W         = Adam's step on dL_meta/dW

    No graph of second order is needed: dL_meta/dw[i,k] = -(1/n) <grad l[i,k](theta), u>, with u = c P grad
    L_meta(theta') and c the clipping constant. `--meta_gradient forward`, the default on accelerators, computes this
    by forward-mode differentiation along u, in one forward pass, with autocast where the training has it; it never
    waits for the device. `directional`, the default on the CPU, takes central differences along u, in full float32
    also under mixed precision; `exact` is the double backward, in float32 too. All use the dropout masks of the train
    half's first pass. Parameters, buffers and random states are left as they were to the last bit. A batch of one
    sample has no halves: W rests. Logged weights are those of the main process' samples.

    The meta half is half of one process' micro-batch, 16 samples at a batch size of 32, where the paper's CIFAR runs
    have 512: of so few a deep exit is charged with one sample or none, and the meta gradient is noisier in proportion.

    Differences from the paper's code:
        - Both look-aheads start at the same theta, and then one step takes the whole batch; there, each half has its
          own step, and the second look-ahead starts after the first step.
        - The look-ahead is the real optimizer's step, clipped and per parameter group, for SGD and AdamW, made linear
          in g: c and the g^2 of AdamW count as constants. There it is SGD's only, and nothing is clipped.
        - A sample of the meta half leaves the batch where it is charged, which spares the layers behind: the loss and
          its gradient are those of all samples at all exits, but for the draws of dropout.
        - A directional derivative takes the place of the double backward (`exact` keeps it).
        - `--exit_loss_weights` multiplies w in the look-ahead too; soft labels and label smoothing are respected.
          Mixup and CutMix mix row i with row n - 1 - i: the halves of such a batch show the same images.
        - W's generator and the order of equally confident samples are fixed: runs repeat and resume to the bit.

    References:
        Han, Pu, Lai, Wang, Song, Cao, Huang, Deng, Huang: Learning to Weight Samples for Dynamic Early-exiting
        Networks (ECCV 2022).
    """

    arguments_class = MetaWeightedArguments
    citation = "https://arxiv.org/abs/2209.08310"

    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self._check_settings(own_optimizer=kwargs.get("optimizer_cls_and_kwargs") is not None)
        self._make_weight_network()

    def _make_weight_network(self) -> None:
        self.meta_generator = torch.Generator().manual_seed(self.args.seed)
        self.weight_network = WeightPredictionNetwork(self.model.num_exits, self.scheme_args, self.meta_generator)
        self.weight_network.to(self.args.device)
        self.meta_optimizer = torch.optim.Adam(
            self.weight_network.parameters(),
            lr=self.scheme_args.meta_learning_rate,
            weight_decay=self.scheme_args.meta_weight_decay,
        )
        self.meta_scheduler = None
        self._looked_ahead_at = None
        self._share_offset = 0.0  # u of `charged_shares`, drawn at each look-ahead
        # For the log: (2, batch, K) weights and losses of the last batches, how many are new, the meta losses.
        self._recent, self._unlogged = deque(maxlen=1000), 0
        self._summed_meta_losses, self._num_meta_losses = 0.0, 0

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # for another model
            self._make_weight_network()

    # What cannot be trained

    def check_model(self, model) -> None:
        _check_problem(model.config.problem_type, model.config.num_labels)
        dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
        if not dtypes <= {"torch.float32", "torch.float64"}:
            raise ExitConfigurationError(
                f"--method l2w needs parameters in float32, not {', '.join(sorted(dtypes))}: load the checkpoint with "
                "dtype=torch.float32, and give --bf16 for speed."
            )
        super().check_model(model)

    def _check_settings(self, own_optimizer: bool) -> None:
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        if sharded or self.is_fsdp_enabled or self.args.fsdp or self.is_deepspeed_enabled:
            raise ExitConfigurationError(
                "--method l2w changes whole parameters in place and cannot train sharded ones: leave out --fsdp, "
                "--deepspeed and tensor parallelism."
            )
        if self.optimizer is not None:
            _check_optimizer(self.optimizer)
        elif not own_optimizer and self.args.optim not in _OPTIMIZERS:
            raise ExitConfigurationError(_unknown_optimizer(self.args.optim.value))
        # Older versions of transformers know one of the two names only.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (getattr(self.args, name, None) or {}).get("use_reentrant"):
                raise ExitConfigurationError(
                    "--method l2w takes gradients that re-entrant checkpointing does not give: leave use_reentrant "
                    f"out of --{name}."
                )
        kernel = self.model.config._attn_implementation
        if "flash" in str(kernel):
            raise ExitConfigurationError(
                f"--method l2w needs float32 or derivatives that {kernel} does not have: use --attn_implementation "
                "sdpa."
            )
        method = self.scheme_args.meta_gradient
        if method in ("exact", "forward") and kernel not in _DIFFERENTIABLE:
            raise ExitConfigurationError(
                f"--meta_gradient {method} needs derivatives that {kernel} does not have: use --attn_implementation "
                "eager or sdpa."
            )
        if method == "exact":
            # The newer name first: the older one warns.
            if getattr(self.args, "activation_checkpointing", None) or self.args.gradient_checkpointing:
                raise ExitConfigurationError(
                    "--meta_gradient exact does not work with --gradient_checkpointing: use `auto`."
                )

    def losses_of(self, exit_logits, labels):
        losses = super().losses_of(exit_logits, labels)
        _check_problem(self.model.config.problem_type, self.model.config.num_labels)
        return losses

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        _check_optimizer(optimizer)
        return optimizer

    # The weighted step

    def sample_weights(self, losses, exit_logits):
        with torch.no_grad():
            weights = self.weight_network(losses, exit_logits)
        self._recent.append(torch.stack([weights, losses]))
        self._unlogged += 1
        return weights

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        if step != self._looked_ahead_at:
            self._looked_ahead_at = step
            # Without labels the weighted step says what is missing.
            if step % self.scheme_args.meta_interval == 0 and inputs.get("labels") is not None:
                model.train()
                if self.in_warm_start():
                    self.meta_optimizer.zero_grad()
                    self.meta_optimizer.step()  # without a gradient: the schedule alone goes on
                    self.meta_scheduler.step()
                else:
                    self.meta_step(self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    # Learning W

    def meta_step(self, inputs: dict) -> None:
        """Update W on both orders of the halves of `inputs`."""
        halves, device = _halve(inputs), self.args.device
        words = _words_of(inputs, self.model, self.optimizer)
        self._share_offset = torch.rand((), generator=self.meta_generator, dtype=torch.float64).item()
        with _random_fork(device), _restored(list(self.model.buffers())), words:
            for train, meta in (halves, halves[::-1]):
                self.meta_optimizer.zero_grad()
                if len(train["labels"]) and len(meta["labels"]):
                    weights, gradient, meta_loss = self.meta_gradient(train, meta)
                    weights.backward(gradient)
                    self._summed_meta_losses = self._summed_meta_losses + meta_loss
                    self._num_meta_losses += 1
                if self._average_over_processes():
                    self.meta_optimizer.step()
        self.meta_scheduler.step()

    def meta_gradient(self, train: dict, meta: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look one step ahead on the train half, and judge the step on the meta half.

        Returns:
            w of the train half, (n, K), with its graph through W; dL_meta/dw, (n, K); L_meta.
        """
        forward = self.meta_method() == "forward"
        # The rounding of TF32 would drown a change of 1e-6 in a parameter.
        with _float32_precision(None if forward else "ieee"):
            if self.meta_method() == "exact":
                with sdpa_kernel(SDPBackend.MATH):
                    return self._exact_gradient(train, meta)
            return self._estimated_gradient(train, meta, forward)

    def meta_method(self) -> str:
        """`--meta_gradient`, with what `auto` means here."""
        method, kernel = self.scheme_args.meta_gradient, self.model.config._attn_implementation
        if method == "auto":
            plain = self.args.device.type == "cpu" or kernel not in _DIFFERENTIABLE
            method = "directional" if plain else "forward"
        return method

    def _estimated_gradient(self, train, meta, forward: bool):
        # At the peak two sets of tensors stand beside the gradient that joint training has too: `ahead`, `direction`.
        device, masks = self.args.device, _random_state(self.args.device)
        scaler = self.accelerator.scaler if forward else None
        attention = nullcontext()
        if forward and self._drops_attention():
            attention = sdpa_kernel(SDPBackend.MATH)  # other kernels draw other masks than the derivative will
        with attention:
            weights, _, named, direction, clip = self._train_pass(train, scaler=scaler)
        parameters = list(named.values())
        _lay_out(direction, parameters)
        with _stand_ins(parameters) as (values, ahead):
            # u = c P grad L_meta; c comes last. Where g is exactly zero, half a does not use the parameter, and what u
            # is there changes nothing, except that it would take its part of ||u||.
            linear_step(self.optimizer, parameters, values, direction, ahead, clip)
            meta_loss = self._meta_loss(meta)
            if not meta_loss.requires_grad:  # all are charged at an exit that is frozen
                return weights, torch.zeros_like(weights), meta_loss
            scaled = meta_loss if scaler is None else scaler.scale(meta_loss)
            torch._foreach_mul_(direction, torch.autograd.grad(scaled, parameters, materialize_grads=True))
            if not forward:
                derivative = self._central_differences(train, values, direction, ahead, masks)
        if forward:
            with _random_fork(device, masks):
                derivative = self._forward_derivative(train, named, direction)
        if scaler is not None:
            derivative = derivative / scaler.scale(torch.ones_like(meta_loss))
        gradient = clip * self.exit_loss_weights.to(weights) * derivative / -len(derivative)
        # In half precision a gradient may overflow; then the step itself is left out too.
        gradient = torch.where(gradient.isfinite().all(), gradient, 0)
        return weights, gradient, meta_loss.detach()

    def _drops_attention(self) -> bool:
        """Whether attention may drop weights; `True` where the config does not say."""
        config = self.model.config.to_dict()
        rates = [rate for name, rate in config.items() if "att" in name and "drop" in name]
        return any(rates) or not rates

    @torch.no_grad()
    def _central_differences(self, train, values, direction, ahead, masks) -> torch.Tensor:
        """(l(theta + h u) - l(theta - h u)) / 2h, (n, K); `ahead` are the present values of the parameters."""
        norm = get_total_norm(direction).item()
        if not 0 < norm < math.inf:
            return self._losses(train)[0] * 0
        h, sides = _STEP_NORM / norm, []
        for sign in (1, -1):
            for value, part, moved in zip(values, direction, ahead, strict=True):
                torch.add(value, part, alpha=sign * h, out=moved)
            with _random_fork(self.args.device, masks):
                sides.append(self._losses(train)[0])
        return (sides[0] - sides[1]) / (2 * h)

    @torch.no_grad()
    def _forward_derivative(self, train, named: dict, direction) -> torch.Tensor:
        """<grad l, u>, (n, K), in one forward pass over pairs of values and their derivatives along u."""
        # As long as half precision can hold it: a mean square of 2^-10 a parameter.
        size = sum(part.numel() for part in direction)
        scale = get_total_norm(direction).clamp(min=torch.finfo(torch.float32).tiny) * (32 / size**0.5)
        torch._foreach_div_(direction, scale)
        values = self._cast_of_linear(named.values(), [parameter.detach() for parameter in named.values()])
        direction = self._cast_of_linear(named.values(), direction)
        # In half precision attention alone multiplies in float32.
        half = any(value.dtype in (torch.float16, torch.bfloat16) for value in values)
        precision = _float32_precision("tf32" if half else None)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FewKernels(), precision:
            pairs = {
                f"network.{name}": forward_ad.make_dual(value, part)
                for name, value, part in zip(named, values, direction, strict=True)
            }
            tangent = forward_ad.unpack_dual(self._losses(train, pairs)[0]).tangent
            return tangent * scale

    def _cast_of_linear(self, parameters, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """`tensors`, those of linear layers all at once in the type to which autocast would cast each."""
        with self._precision():
            kind = self.args.device.type
            if not torch.is_autocast_enabled(kind):
                return tensors
            dtype = torch.get_autocast_dtype(kind)
        linear = [module for module in self.model.modules() if type(module) is nn.Linear]
        linear = {id(parameter) for module in linear for parameter in module.parameters()}
        places = [n for n, parameter in enumerate(parameters) if id(parameter) in linear]
        cast = [torch.empty_like(tensors[n], dtype=dtype) for n in places]
        if places:
            torch._foreach_copy_(cast, [tensors[n] for n in places])
        of_place = dict(zip(places, cast, strict=True))
        return [of_place.get(n, tensor) for n, tensor in enumerate(tensors)]

    def _exact_gradient(self, train, meta):
        weights, leaf, parameters, gradients, clip = self._train_pass(train, create_graph=True)
        constants = [part.detach() for part in gradients]
        slopes = [part.clone() for part in constants]
        values = [parameter.detach() for parameter in parameters.values()]
        ahead = [torch.empty_like(value) for value in values]
        linear_step(self.optimizer, list(parameters.values()), values, slopes, ahead, clip)
        # The value is theta', the derivative -c P.
        moved = {
            f"network.{name}": value - slope * clip * (part - constant)
            for name, value, slope, part, constant in zip(parameters, ahead, slopes, gradients, constants, strict=True)
        }
        meta_loss = self._meta_loss(meta, moved)
        if not meta_loss.requires_grad:
            return weights, torch.zeros_like(weights), meta_loss
        return weights, torch.autograd.grad(meta_loss, leaf, materialize_grads=True)[0], meta_loss.detach()

    def _train_pass(self, train: dict, create_graph: bool = False, scaler=None):
        """w with its graph through W; w as a leaf; by name the parameters that will step; their gradients; c."""
        losses, exit_logits = self._losses(train)
        weights = self.weight_network(losses.detach(), exit_logits.detach())
        leaf = weights.detach().requires_grad_(create_graph)
        loss = reduce_losses(losses, self.exit_loss_weights.to(losses) * leaf)
        loss = loss if scaler is None else scaler.scale(loss)
        trainable = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad(loss, trainable.values(), create_graph=create_graph, allow_unused=True)
        # A parameter without gradient is left alone by the optimizer, decay included.
        reached = {name: part for name, part in zip(trainable, gradients, strict=True) if part is not None}
        if scaler is not None:
            torch._foreach_div_(list(reached.values()), scaler.scale(torch.ones_like(loss)))
        clip, limit = 1.0, self.args.max_grad_norm
        if limit and limit > 0:
            norm = get_total_norm([part.detach() for part in reached.values()])
            clip = (limit / (norm + 1e-6)).clamp(max=1.0)
        # An optimizer of one's own may hold some of the parameters only. The norm is of all.
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        stepped = {name: trainable[name] for name in reached if id(trainable[name]) in held}
        return weights, leaf, stepped, [reached[name] for name in stepped], clip

    @contextmanager
    def _precision(self):
        """The training's own for `forward`, else full float32."""
        with torch.autocast(self.args.device.type, enabled=False):
            if self.meta_method() != "forward":
                yield
            else:
                # Without the cache of cast parameters: it would outlive a change of their values.
                with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
                    yield

    def _outputs(self, inputs: dict, parameters: dict | None = None, shares: list[int] | None = None):
        """What `_Forward` gives, at `parameters` where given."""
        network = _Forward(self.model)
        with self._precision():
            if parameters is None:
                return network(inputs, shares)
            return functional_call(network, parameters, (inputs, shares))

    def _losses(self, inputs: dict, parameters: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """l (n, K) and the logits (n, K, num_labels) of `inputs`, at `parameters` where given."""
        exit_logits = self._outputs(inputs, parameters)
        return self.losses_of(exit_logits, inputs["labels"]), exit_logits

    def _meta_loss(self, inputs: dict, parameters: dict | None = None) -> torch.Tensor:
        labels, args = inputs["labels"], self.scheme_args
        shares = charged_shares(len(labels), self.model.num_exits, args.meta_target_p, self._share_offset)
        logits, ids = self._outputs(inputs, parameters, shares)
        losses = self.losses_of(logits.unsqueeze(1), labels[ids]).squeeze(1)
        return torch.stack([part.mean() for part in losses.split(shares) if len(part)]).sum()

    def _average_over_processes(self) -> bool:
        """Average W's gradient over the processes that have one; `False` if none has."""
        parameters = list(self.weight_network.parameters())
        ready = parameters[0].grad is not None
        if self.accelerator.num_processes == 1:
            return ready
        parts = [(p.grad if ready else torch.zeros_like(p)).flatten() for p in parameters]
        total = self.accelerator.reduce(torch.cat([*parts, parts[0].new_tensor([float(ready)])]), "sum")
        for parameter, part in zip(parameters, total[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (part / total[-1]).view_as(parameter)
        return ready or total[-1].item() > 0

    # Schedule and checkpoints

    def create_scheduler(self, num_training_steps, optimizer=None):
        num_updates = math.ceil(num_training_steps / self.scheme_args.meta_interval)
        schedule = self.scheme_args.meta_lr_scheduler_type
        self.meta_scheduler = get_scheduler(schedule, self.meta_optimizer, 0, num_updates)
        self._looked_ahead_at = None
        return super().create_scheduler(num_training_steps, optimizer)

    def _meta_parts(self) -> dict:
        return {"network": self.weight_network, "optimizer": self.meta_optimizer, "scheduler": self.meta_scheduler}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {name: part.state_dict() for name, part in self._meta_parts().items()}
            torch.save({**state, "generator": self.meta_generator.get_state()}, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            raise ExitConfigurationError(
                f"--resume_from_checkpoint {checkpoint} has no {STATE_FILE}, the weight network of --method l2w: "
                f"start anew from its weights with --model_name_or_path {checkpoint}."
            )
        with reading_checkpoint(checkpoint):
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._meta_parts().items():
                part.load_state_dict(state[name])
            self.meta_generator.set_state(state["generator"])

    # What W has learned

    def log(self, logs, start_time=None):
        """As in `Trainer`; beside the loss stands what W did since the last time."""
        if "loss" in logs and self._unlogged:
            weights, losses = torch.cat(list(self._recent)[-self._unlogged :], 1).double().cpu()
            by_exit = [values - values.mean(0) for values in (weights, losses)]
            # 0 where the weights of an exit do not vary.
            spread = by_exit[0].norm(dim=0) * by_exit[1].norm(dim=0)
            correlations = (by_exit[0] * by_exit[1]).sum(0) / spread.clamp(min=1e-12)
            logs = {**logs, "l2w_weight_std": weights.std(correction=0).item()}
            for k, (mean, correlation) in enumerate(zip(weights.mean(0), correlations, strict=True), 1):
                logs[f"l2w_weight_exit{k}"] = mean.item()
                logs[f"l2w_correlation_exit{k}"] = correlation.item()
            if self._num_meta_losses:
                logs["l2w_meta_loss"] = (self._summed_meta_losses / self._num_meta_losses).item()
            self._unlogged, self._summed_meta_losses, self._num_meta_losses = 0, 0.0, 0
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As in `EarlyExitTrainer`; leaves a heat map of weight against loss in the output folder."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.is_world_process_zero() and self._recent:
            weights, losses = torch.cat(list(self._recent), 1).double().cpu()
            save_weight_map(weights, losses, self.args.output_dir)
        return output


def _check_problem(problem_type: str | None, num_labels: int) -> None:
    if problem_type not in (None, "single_label_classification") or num_labels == 1:
        raise ExitConfigurationError(
            f"--method l2w is for single-label classification, not {problem_type or 'regression'}: use --method joint "
            "or boosted. If the labels are soft, set problem_type='single_label_classification' in the config."
        )


def _check_optimizer(optimizer) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    switches = [name for name in ("amsgrad", "maximize") if any(group.get(name) for group in optimizer.param_groups)]
    if switches or type(optimizer) not in (torch.optim.AdamW, torch.optim.SGD):
        raise ExitConfigurationError(_unknown_optimizer(" with ".join([type(optimizer).__name__, *switches])))


def _unknown_optimizer(found: str) -> str:
    return f"--method l2w looks ahead by AdamW's or SGD's step: --optim must be {', '.join(_OPTIMIZERS)}, not {found}."


def save_weight_map(weights: torch.Tensor, losses: torch.Tensor, folder: str) -> None:
    """Write the mean weight at each exit and loss as `l2w_weights.json` and, a heat map, `l2w_weights.png`.

    Args:
        weights: (samples, K).
        losses: (samples, K); the outer bins take what lies beyond them.
        folder: takes the files.
    """
    from matplotlib.figure import Figure

    edges = torch.logspace(-3, 1, 33, dtype=torch.float64)
    bins = torch.bucketize(losses, edges[1:-1].contiguous(), right=True).T
    counts = torch.zeros(len(bins), len(edges) - 1, dtype=torch.float64)
    sums = counts.scatter_add(1, bins, weights.T)
    counts.scatter_add_(1, bins, torch.ones_like(weights.T))
    means = sums / counts
    table = {
        "num_samples": len(losses),
        "loss_edges": edges.tolist(),
        "counts": counts.long().tolist(),
        "mean_weight": [[None if math.isnan(mean) else mean for mean in row] for row in means.tolist()],
    }
    with open(os.path.join(folder, f"{WEIGHT_MAP}.json"), "w") as file:
        json.dump(table, file, indent=2)

    figure = Figure(figsize=(7, 1.5 + 0.3 * len(means)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="loss", ylabel="exit", yticks=range(1, len(means) + 1))
    axes.set_facecolor("lightgrey")  # no samples
    reach = max((means - 1).abs().nan_to_num().max().item(), 0.01)
    rows = [k + 0.5 for k in range(len(means) + 1)]
    colours = {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach}
    figure.colorbar(axes.pcolormesh(edges.numpy(), rows, means.numpy(), **colours), label="mean weight")
    axes.invert_yaxis()
    figure.savefig(os.path.join(folder, f"{WEIGHT_MAP}.png"), dpi=120)
