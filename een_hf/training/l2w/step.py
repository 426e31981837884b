"""The step of AdamW or SGD, made linear in the gradient and without a trace in the optimizer."""

import torch
from torch.optim.adamw import adamw

from . import devices


# Numbers of a piece, about: what a CPU keeps of each tensor in its cache.
PIECE = 2**18


@torch.no_grad()
def linear_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.Tensor],
    values: list[torch.Tensor],
    gradients: list[torch.Tensor],
    ahead: list[torch.Tensor],
    clip: torch.Tensor | float = 1.0,
    rates: list[torch.Tensor] | None = None,
) -> None:
    """Compute the step that AdamW or SGD would make, without changing its state.

    Args:
        optimizer: the optimizer, which is only read.
        parameters: the parameters with a gradient, by which the optimizer's groups and states are found.
        values: theta.
        gradients: the gradients; overwritten with P. With the g^2 of AdamW held constant, theta' decreases by P per
            unit of the clipped gradient g. P is 0 if g is exactly 0: for an embedding row whose token has not occurred
            yet, AdamW's P would be 1/eps.
        ahead: overwritten with theta'.
        clip: the clipped gradient g is this times `gradients`.
        rates: learning rate of each group; `None`: those of the optimizer.
    """
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    for number, group in enumerate(optimizer.param_groups):
        group = group if rates is None else {**group, "lr": rates[number]}
        chosen = [places[id(parameter)] for parameter in group["params"] if id(parameter) in places]
        rows = [(optimizer.state.get(parameters[n], {}), values[n], gradients[n], ahead[n]) for n in chosen]
        for piece in _pieces(rows):
            states, *tensors = map(list, zip(*piece, strict=True))
            torch._foreach_mul_(tensors[1], clip)
            _step_of(group, states)(group, states, *tensors)


def _step_of(group: dict, states: list[dict]):
    if "betas" not in group:
        return _sgd_step
    readable = all(devices.on_host(state["step"]) for state in states if state)
    return _adamw_step if readable or group["betas"][0] == 0 else _fused_adamw_step


def _pieces(rows: list[tuple]):
    """`rows` of (state, *tensors), all together; on a CPU in parts that stay in its cache during the whole step."""
    if not all(devices.on_host(tensor) and tensor.is_contiguous() for _, *tensors in rows for tensor in tensors):
        yield rows
        return
    ready, size = [], 0
    for row in rows:
        for part in _split(*row):
            ready.append(part)
            size += part[1].numel()
            if size >= PIECE:
                yield ready
                ready, size = [], 0
    if ready:
        yield ready


def _split(state: dict, *tensors):
    if tensors[0].numel() <= PIECE:
        yield state, *tensors
        return
    entries = {name: entry for name, entry in state.items() if name != "step" and entry is not None}
    parts = (tensor.reshape(-1).split(PIECE) for tensor in (*entries.values(), *tensors))
    for part in zip(*parts, strict=True):
        yield {**state, **dict(zip(entries, part, strict=False))}, *part[len(entries) :]


def _adamw_state(states, values) -> list[list[torch.Tensor]]:
    """First and second moments; zeros if there are none yet."""
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
    # The square root. On a CPU torch's own may take several times as long if there are zeros.
    torch._foreach_rsqrt_(slopes)
    torch._foreach_reciprocal_(slopes)
    torch._foreach_add_(slopes, group["eps"])
    # To save memory, `ahead` contains the first moment before theta'.
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
            lr=group["lr"],
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
    """Replace all numbers that are not exactly zero by 1."""
    torch._foreach_sign_(gradients)
    torch._foreach_abs_(gradients)
