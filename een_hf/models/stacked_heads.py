"""The heads of several exits, evaluated together: on an accelerator a few large operations replace many small ones."""

import torch
from torch import nn

from .exits import POOLINGS, ExitHead, scale_gradient


def can_stack(heads: list[nn.Module]) -> bool:
    """Whether `classify_stacked` computes the same as these heads one by one."""
    head_class = type(heads[0]) if heads else None
    if len(heads) < 2 or getattr(head_class, "forward", None) is not ExitHead.forward:
        return False
    # If a subclass overrides `classify` only, the inherited `classify_stacked` does not compute the same.
    stacked, single = (
        next(base for base in head_class.__mro__ if name in vars(base)) for name in ("classify_stacked", "classify")
    )
    first = _plain_parts(heads[0])
    return (
        stacked is single
        and head_class.classify_stacked is not None
        and all(_plain_parts(head) == first for head in heads[1:])
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _plain_parts(head: nn.Module) -> list | object:
    """A description of a head's modules; equal to no other if a module may do more than torch's own modules do."""
    parts = []
    for module in head.modules():
        own = module is head or type(module).__module__.startswith("torch.nn.modules.")
        if not own or "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS):
            return object()
        parts.append((type(module), module.training, module.extra_repr()))
    return parts


class StackedHeads:
    """The heads of several exits, evaluated together: the number of operations does not grow with that of exits.

    Args:
        heads: the heads in the order of their exits; `can_stack(heads)` must be true.
    """

    def __init__(self, heads: list[ExitHead]):
        self.heads, self.pooled = heads, []
        self._weights: torch.Tensor | None = None

    def read(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        head_scale: float = 1.0,
        layers_scale: float = 1.0,
    ) -> torch.Tensor:
        """Pool hidden states for the next head.

        Args:
            hidden: (batch, length, hidden_size), after the exit's layer.
            attention_mask: (batch, length), or `None`: no padding.
            head_scale: factor of the gradient that comes from the head.
            layers_scale: factor of the gradient that comes from the layers after the exit.

        Returns:
            the hidden states for the next layer, of the same shape and values.
        """
        head = self.heads[len(self.pooled)]
        # In half precision the pooling weights, such as 1 / length, would be rounded.
        half = hidden.dtype in (torch.float16, torch.bfloat16)
        if half or type(head).pool is not ExitHead.pool or not POOLINGS[head.pooling].linear:
            self.pooled.append(head.pool(scale_gradient(hidden, head_scale), attention_mask))
            return scale_gradient(hidden, layers_scale)
        with torch.autocast(hidden.device.type, enabled=False):
            if self._weights is None:
                self._weights = _pooling_weights(head, hidden, attention_mask)
            hidden, pooled = _WeightedSums.apply(hidden, self._weights, head_scale, layers_scale)
        self.pooled.append(pooled.flatten(1))
        return hidden

    def classify(self) -> torch.Tensor:
        """The logits (heads, batch, num_labels) of all heads."""
        return type(self.heads[0]).classify_stacked(self.heads, torch.stack(self.pooled))


class _WeightedSums(torch.autograd.Function):
    """Hidden states and weighted sums of them; the backward pass scales and adds both gradients in one product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden, weights, sums_scale, hidden_scale):
        return hidden.view_as(hidden), torch.bmm(weights, hidden)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weights, *ctx.scales = inputs
        ctx.save_for_backward(weights)
        ctx.save_for_forward(weights)

    @staticmethod
    def backward(ctx, hidden, sums):
        (weights,), (sums_scale, hidden_scale) = ctx.saved_tensors, ctx.scales
        return torch.baddbmm(hidden, weights.mT, sums, beta=hidden_scale, alpha=sums_scale), None, None, None

    @staticmethod
    def jvp(ctx, hidden, *_):
        (weights,) = ctx.saved_tensors
        return hidden.view_as(hidden), torch.bmm(weights, hidden)


def _pooling_weights(head: ExitHead, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The matrix of a linear pooling, (batch, width, length): its result if the hidden state n is unit vector n."""
    batch, length = hidden.shape[:2]
    tokens = torch.eye(length, dtype=hidden.dtype, device=hidden.device).unsqueeze(0)
    if attention_mask is not None:
        tokens = tokens.expand(batch, -1, -1)
    return head.pool(tokens, attention_mask).unflatten(1, (-1, length)).expand(batch, -1, -1)


def add_boosted_stack(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`add_boosted` for all exits at once: F_k = f_k + sum over j < k of t^(k-j) * stop_gradient(f_j).

    Args:
        logits: f, (num_exits, batch, num_labels).
        temperature: t.

    Returns:
        F, of the same shape, in float32 or better.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    exits = torch.arange(len(logits), dtype=dtype, device=logits.device)
    powers = (temperature ** (exits[:, None] - exits)).tril(-1)
    with torch.autocast(logits.device.type, enabled=False):
        return logits + (powers @ logits.detach().to(dtype).flatten(1)).view_as(logits)
