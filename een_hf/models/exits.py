"""What exits read, their heads, and how exits add up."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .registries import ExitConfigurationError, Registry


POOLINGS: dict[str, Callable] = Registry("exit_pooling (--exit_pooling)")
EXIT_HEADS: dict[str, type["ExitHead"]] = Registry("exit_head (--exit_head)")


def _cls(hidden: torch.Tensor, attention_mask: torch.Tensor | None, num_prefix_tokens: int) -> torch.Tensor:
    return hidden[:, 0]


def _mean(hidden: torch.Tensor, attention_mask: torch.Tensor | None, num_prefix_tokens: int) -> torch.Tensor:
    if attention_mask is None:
        return hidden[:, num_prefix_tokens:].mean(1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _cls_mean(hidden: torch.Tensor, attention_mask: torch.Tensor | None, num_prefix_tokens: int) -> torch.Tensor:
    return torch.cat([_cls(hidden, None, 0), _mean(hidden, attention_mask, num_prefix_tokens)], -1)


def register_pooling(name: str, width: int = 1, linear: bool = False):
    """Function decorator: make a pooling known as `exit_pooling` under `name`.

    The function takes hidden states (batch, length, hidden_size), the mask (batch, length) or `None`, and the number
    of tokens that stand before the patches of an image (0 for text), and returns (batch, width * hidden_size).

    Args:
        name: for `exit_pooling`.
        width: of what the function returns, in hidden_size.
        linear: whether that is `width` sums of the hidden states, one after the other, each with weights that depend
            on the tokens' places and the mask alone. Training on an accelerator then takes one product per exit.
    """

    def register(pooling: Callable) -> Callable:
        if not callable(pooling):
            raise ExitConfigurationError(f"{POOLINGS.setting}: {pooling!r} is no function.")
        pooling.width, pooling.linear = width, linear
        POOLINGS[name] = pooling
        return pooling

    return register


def find_pooling(name: str) -> str:
    """The name of a pooling, registered or `package.module:function`, which is imported: for what users type."""
    return POOLINGS.find(name, register_pooling)


register_pooling("cls", linear=True)(_cls)
register_pooling("mean", linear=True)(_mean)
register_pooling("cls_mean", width=2, linear=True)(_cls_mean)


def pool_hidden_states(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str, num_prefix_tokens: int = 0
) -> torch.Tensor:
    """Reduce hidden states to one vector per example.

    Args:
        hidden: (batch, length, hidden_size).
        attention_mask: (batch, length), 1 for tokens and 0 for padding; `None` means no padding.
        pooling: `cls` (the first position), `mean` (over the unmasked positions, or over the patches of an image),
            `cls_mean` (both, concatenated), or the name of a registered one.
        num_prefix_tokens: class, distillation and register tokens before the patches of an image, which the mean
            leaves out; 0 for text.

    Returns:
        (batch, hidden_size), for `cls_mean` (batch, 2 * hidden_size).
    """
    return POOLINGS[pooling](hidden, attention_mask, num_prefix_tokens)


def register_exit_head(name: str):
    """Class decorator: make a head known as config field `exit_head` under `name`."""

    def register(head_class: type["ExitHead"]) -> type["ExitHead"]:
        EXIT_HEADS.check_class(head_class, ExitHead)
        EXIT_HEADS[name] = head_class
        return head_class

    return register


def find_exit_head(name: str) -> str:
    """The name of a head, registered or `package.module:Class`, which is imported: for what users type."""
    return EXIT_HEADS.find(name, register_exit_head)


class ExitHead(nn.Module):
    """Hidden states to logits; a subclass builds its modules on `self.width` numbers and supplies `classify`.

    With a static method `classify_stacked(heads, pooled)` beside `classify` the heads of several exits are trained
    together on accelerators: it takes heads that differ in their parameters' values only and what they read, (heads,
    batch, width), and returns (heads, batch, num_labels). Heads with hooks, or with modules from outside torch, are
    evaluated one by one all the same.

    Args:
        config: of the early-exit model; the head reads what `exit_pooling` says.
    """

    classify_stacked: Callable | None = None

    def __init__(self, config):
        super().__init__()
        self.pooling, self.num_prefix_tokens = config.exit_pooling, config.num_prefix_tokens
        self.width = POOLINGS[self.pooling].width * config.hidden_size

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """What the head reads, (batch, width), of hidden states (batch, length, hidden_size)."""
        return pool_hidden_states(hidden, attention_mask, self.pooling, self.num_prefix_tokens)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (batch, num_labels) of pooled hidden states (batch, width)."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, num_labels) of hidden states (batch, length, hidden_size) and their mask (batch, length)."""
        return self.classify(self.pool(hidden, attention_mask))


@register_exit_head("pooler")
class BertExitHead(ExitHead):
    """Dense, tanh, dropout and linear: the stock classification head of BERT."""

    def __init__(self, config):
        super().__init__(config)
        self.dense = nn.Linear(self.width, config.hidden_size)
        self.dropout = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(torch.tanh(self.dense(pooled))))

    @staticmethod
    def classify_stacked(heads: list["BertExitHead"], pooled: torch.Tensor) -> torch.Tensor:
        features = torch.tanh(stacked_linear([head.dense for head in heads], pooled))
        return stacked_linear([head.classifier for head in heads], heads[0].dropout(features))


@register_exit_head("norm")
class ViTExitHead(ExitHead):
    """Layer norm and linear: the stock classification head of ViT."""

    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(self.width, eps=getattr(config, "layer_norm_eps", 1e-5))
        self.classifier = nn.Linear(self.width, config.num_labels)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layernorm(pooled))

    @staticmethod
    def classify_stacked(heads: list["ViTExitHead"], pooled: torch.Tensor) -> torch.Tensor:
        normed = stacked_layer_norm([head.layernorm for head in heads], pooled)
        return stacked_linear([head.classifier for head in heads], normed)


@register_exit_head("norm_pooler")
class NormedExitHead(BertExitHead):
    """Layer norm before dense, tanh, dropout and linear: for layers whose hidden states are not normed."""

    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(self.width, eps=getattr(config, "layer_norm_eps", 1e-5))

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return super().classify(self.layernorm(pooled))

    @staticmethod
    def classify_stacked(heads: list["NormedExitHead"], pooled: torch.Tensor) -> torch.Tensor:
        return BertExitHead.classify_stacked(heads, stacked_layer_norm([head.layernorm for head in heads], pooled))


def stacked_linear(modules: list[nn.Linear], inputs: torch.Tensor) -> torch.Tensor:
    """Each module on its own slice of the inputs: (modules, batch, in) to (modules, batch, out)."""
    weights = torch.stack([module.weight for module in modules])
    biases = torch.stack([module.bias for module in modules]).unsqueeze(1)
    if weights.requires_grad:
        # Its gradient comes transposed: one copy here, or one for every module.
        weights.register_hook(torch.Tensor.contiguous)
    return torch.baddbmm(biases, inputs, weights.mT)


def stacked_layer_norm(modules: list[nn.LayerNorm], inputs: torch.Tensor) -> torch.Tensor:
    """Each module on its own slice of the inputs: (modules, batch, width) to the same shape."""
    weights = torch.stack([module.weight for module in modules]).unsqueeze(1)
    biases = torch.stack([module.bias for module in modules]).unsqueeze(1)
    return torch.addcmul(biases, F.layer_norm(inputs, modules[0].normalized_shape, eps=modules[0].eps), weights)


def can_stack(heads: list[nn.Module]) -> bool:
    """Whether `classify_stacked` does what these heads do one by one."""
    head_class = type(heads[0]) if heads else None
    if len(heads) < 2 or getattr(head_class, "forward", None) is not ExitHead.forward:
        return False
    # A subclass with another `classify` does not inherit what the older one says of stacks.
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
    """What its modules are; where one may do more than torch's own does, something that equals nothing else."""
    parts = []
    for module in head.modules():
        own = module is head or type(module).__module__.startswith("torch.nn.modules.")
        if not own or "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS):
            return object()
        parts.append((type(module), module.training, module.extra_repr()))
    return parts


class StackedHeads:
    """The heads of several exits, evaluated together: few operations, however many exits there are.

    Args:
        heads: of the exits, in order, for which `can_stack` holds.
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
        """Take what the next head reads of hidden states (batch, length, hidden_size); gives them to the next layer.

        Args:
            hidden: after the exit's layer.
            attention_mask: (batch, length), or `None`: no padding.
            head_scale: factor of the gradient that comes from the head.
            layers_scale: of the gradient that comes from the layers behind.
        """
        head = self.heads[len(self.pooled)]
        # In half precision the weights themselves, such as 1 / length, would be rounded.
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
        """The logits (heads, batch, num_labels)."""
        return type(self.heads[0]).classify_stacked(self.heads, torch.stack(self.pooled))


class _WeightedSums(torch.autograd.Function):
    """Hidden states themselves, and weighted sums of them; both gradients, scaled, become one by one product."""

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
    """The matrix of a linear pooling, (batch, width, length): its result where token n is the unit vector n."""
    batch, length = hidden.shape[:2]
    tokens = torch.eye(length, dtype=hidden.dtype, device=hidden.device).unsqueeze(0)
    if attention_mask is not None:
        tokens = tokens.expand(batch, -1, -1)
    return head.pool(tokens, attention_mask).unflatten(1, (-1, length)).expand(batch, -1, -1)


def add_boosted(logits: torch.Tensor, previous: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """F_k = f_k + t * stop_gradient(F_{k-1}), F_0 = 0 (Boosted Dynamic Neural Networks, AAAI 2023)."""
    return logits if previous is None else logits + temperature * previous.detach()


def add_boosted_stack(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`add_boosted` from exit to exit, at once: F_k = f_k + sum over j < k of t^(k-j) * stop_gradient(f_j).

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


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


def scale_gradient(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """`tensor` itself in the forward pass; its gradient times `scale` in the backward pass."""
    return tensor if scale == 1 else _ScaleGradient.apply(tensor, scale)
