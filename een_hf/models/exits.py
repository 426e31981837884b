"""What exits read, their heads, and how exits add up."""

from collections.abc import Callable

import torch
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


def register_pooling(name: str, width: int = 1):
    """Function decorator: make a pooling known as `exit_pooling` under `name`.

    The function takes hidden states (batch, length, hidden_size), the mask (batch, length) or `None`, and the number
    of tokens that stand before the patches of an image (0 for text), and returns (batch, width * hidden_size).
    """

    def register(pooling: Callable) -> Callable:
        if not callable(pooling):
            raise ExitConfigurationError(f"{POOLINGS.setting}: {pooling!r} is no function.")
        pooling.width = width
        POOLINGS[name] = pooling
        return pooling

    return register


def find_pooling(name: str) -> str:
    """The name of a pooling, registered or `package.module:function`, which is imported: for what users type."""
    return POOLINGS.find(name, register_pooling)


register_pooling("cls")(_cls)
register_pooling("mean")(_mean)
register_pooling("cls_mean", width=2)(_cls_mean)


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

    Args:
        config: of the early-exit model; the head reads what `exit_pooling` says.
    """

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


@register_exit_head("norm")
class ViTExitHead(ExitHead):
    """Layer norm and linear: the stock classification head of ViT."""

    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(self.width, eps=getattr(config, "layer_norm_eps", 1e-5))
        self.classifier = nn.Linear(self.width, config.num_labels)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layernorm(pooled))


@register_exit_head("norm_pooler")
class NormedExitHead(BertExitHead):
    """Layer norm before dense, tanh, dropout and linear: for layers whose hidden states are not normed."""

    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(self.width, eps=getattr(config, "layer_norm_eps", 1e-5))

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return super().classify(self.layernorm(pooled))


def add_boosted(logits: torch.Tensor, previous: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """F_k = f_k + t * stop_gradient(F_{k-1}), F_0 = 0 (Boosted Dynamic Neural Networks, AAAI 2023)."""
    return logits if previous is None else logits + temperature * previous.detach()


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
    return _ScaleGradient.apply(tensor, scale)
