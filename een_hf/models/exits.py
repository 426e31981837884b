"""The parts of an exit: pooling of the hidden states, head, and aggregation with earlier exits."""

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
    """Function decorator that registers a pooling.

    The function takes hidden states (batch, length, hidden_size), the mask (batch, length) or `None`, and the number
    of tokens before the patches of an image (0 for text), and returns (batch, width * hidden_size).

    Args:
        name: the name for `exit_pooling` (`--exit_pooling`).
        width: size of the result, in units of hidden_size.
        linear: whether the result is `width` weighted sums of the hidden states, concatenated, whose weights depend
            only on the mask and the positions. Training on accelerators then needs one matrix product per exit.

    Returns:
        the decorator.

    Raises:
        ExitConfigurationError: what is decorated is no function.

    Example:
        >>> @een_hf.register_pooling("first_two", width=2)
        ... def first_two(hidden, attention_mask, num_prefix_tokens):
        ...     return hidden[:, :2].flatten(1)
    """

    def register(pooling: Callable) -> Callable:
        if not callable(pooling):
            raise ExitConfigurationError(f"{POOLINGS.setting}: {pooling!r} is no function.")
        pooling.width, pooling.linear = width, linear
        POOLINGS[name] = pooling
        return pooling

    return register


def find_pooling(name: str) -> str:
    """The name of a pooling as users type it: a registered name, or `package.module:function`, which is imported."""
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
        attention_mask: (batch, length), 1 for tokens and 0 for padding; `None`: no padding.
        pooling: `cls` (the first position), `mean` (over the unmasked positions, or over the patches of an image),
            `cls_mean` (both, concatenated), or the name of a registered pooling.
        num_prefix_tokens: number of class, distillation and register tokens before the patches of an image, which the
            mean excludes; 0 for text.

    Returns:
        (batch, hidden_size), for `cls_mean` (batch, 2 * hidden_size).
    """
    return POOLINGS[pooling](hidden, attention_mask, num_prefix_tokens)


def register_exit_head(name: str):
    """Class decorator that registers a head.

    Args:
        name: the name for `exit_head` (`--exit_head`).

    Returns:
        the decorator, for a subclass of `ExitHead`.

    Raises:
        ExitConfigurationError: what is decorated is no subclass of `ExitHead`.

    Example:
        >>> @een_hf.register_exit_head("linear")
        ... class LinearHead(een_hf.models.ExitHead):
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.classifier = torch.nn.Linear(self.width, config.num_labels)
        ...
        ...     def classify(self, pooled):
        ...         return self.classifier(pooled)
    """

    def register(head_class: type["ExitHead"]) -> type["ExitHead"]:
        EXIT_HEADS.check_class(head_class, ExitHead)
        EXIT_HEADS[name] = head_class
        return head_class

    return register


def find_exit_head(name: str) -> str:
    """The name of a head as users type it: a registered name, or `package.module:Class`, which is imported."""
    return EXIT_HEADS.find(name, register_exit_head)


class ExitHead(nn.Module):
    """Base class of heads: from hidden states to logits.

    A subclass builds its modules, which read `self.width` numbers per example, and defines `classify`.

    A static method `classify_stacked(heads, pooled)` in the same class lets the heads of several exits be trained
    together on accelerators. It takes heads that differ only in the values of their parameters, and pooled hidden
    states (heads, batch, width), and returns logits (heads, batch, num_labels). Heads with hooks, or with modules
    that are not torch's own, are always evaluated one by one.

    Args:
        config: config of the early-exit model; `exit_pooling` is the pooling of the head.
    """

    classify_stacked: Callable | None = None

    def __init__(self, config):
        super().__init__()
        self.pooling, self.num_prefix_tokens = config.exit_pooling, config.num_prefix_tokens
        self.width = POOLINGS[self.pooling].width * config.hidden_size

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Reduce hidden states to what the head reads.

        Args:
            hidden: (batch, length, hidden_size).
            attention_mask: (batch, length), or `None`: no padding.

        Returns:
            (batch, width).
        """
        return pool_hidden_states(hidden, attention_mask, self.pooling, self.num_prefix_tokens)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Args:
            pooled: pooled hidden states (batch, width).

        Returns:
            logits (batch, num_labels).
        """
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool hidden states and compute logits.

        Args:
            hidden: (batch, length, hidden_size).
            attention_mask: (batch, length), or `None`: no padding.

        Returns:
            logits (batch, num_labels).
        """
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
    """Layer norm, dense, tanh, dropout and linear: for encoders whose layers do not end in a layer norm."""

    def __init__(self, config):
        super().__init__(config)
        self.layernorm = nn.LayerNorm(self.width, eps=getattr(config, "layer_norm_eps", 1e-5))

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return super().classify(self.layernorm(pooled))

    @staticmethod
    def classify_stacked(heads: list["NormedExitHead"], pooled: torch.Tensor) -> torch.Tensor:
        return BertExitHead.classify_stacked(heads, stacked_layer_norm([head.layernorm for head in heads], pooled))


@register_exit_head("attention")
class AttentionExitHead(ExitHead):
    """Learned queries that attend to all tokens of an image; then layer norm, dense, GELU, dropout and linear.

    A mean over the patches does not contain where they are, and a class token collects what a classifier needs in the
    last layers only. This head reads the tokens themselves: query q weights the normed token n by
    softmax over n of (w_q . n + b_q), and the head classifies the weighted sums together with the pooled hidden
    states. It costs 2.6 % of a layer of ViT-S at 84 pixels.

    What a head reads is stored when exits are trained on a frozen model (`two_stage`, `retrofit`): here all tokens,
    `num_tokens * hidden_size` numbers per example and exit.

    Args:
        config: config of an early-exit model of images.

    Raises:
        ExitConfigurationError: a model of texts, whose number of tokens varies.

    References:
        Set Transformer (Lee et al., ICML 2019), equation 11, for pooling by attention of learned queries; LGViT (Xu et
        al., ACM MM 2023), section 3, for exits of a ViT that read all patches.
    """

    num_queries = 8

    def __init__(self, config):
        super().__init__(config)
        if not config.num_prefix_tokens:
            raise ExitConfigurationError(
                "exit_head (--exit_head) 'attention' is for images; heads for texts are pooler, norm and norm_pooler."
            )
        size, eps = config.hidden_size, getattr(config, "layer_norm_eps", 1e-5)
        self.hidden_size = size
        self.norm = nn.LayerNorm(size, eps=eps)
        self.queries = nn.Linear(size, self.num_queries)
        self.layernorm = nn.LayerNorm(self.num_queries * size + self.width, eps=eps)
        self.dense = nn.Linear(self.num_queries * size + self.width, size)
        self.dropout = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(size, config.num_labels)

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """All tokens of each example: (batch, length * hidden_size)."""
        return hidden.flatten(1)

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        hidden = pooled.unflatten(1, (-1, self.hidden_size))
        normed = self.norm(hidden)
        weights = self.queries(normed).softmax(1)
        attended = (weights.mT @ normed).flatten(1)
        features = self.layernorm(torch.cat([attended, super().pool(hidden, None)], -1))
        return self.classifier(self.dropout(F.gelu(self.dense(features))))

    @staticmethod
    def classify_stacked(heads: list["AttentionExitHead"], pooled: torch.Tensor) -> torch.Tensor:
        first = heads[0]
        tokens = pooled.unflatten(2, (-1, first.hidden_size))  # (heads, batch, length, hidden_size)
        normed = stacked_layer_norm([head.norm for head in heads], tokens.flatten(1, 2))
        scores = stacked_linear([head.queries for head in heads], normed).unflatten(1, tokens.shape[1:3])
        attended = (scores.softmax(2).mT @ normed.view_as(tokens)).flatten(2)
        plain = ExitHead.pool(first, tokens.flatten(0, 1), None).unflatten(0, tokens.shape[:2])
        features = stacked_layer_norm([head.layernorm for head in heads], torch.cat([attended, plain], -1))
        features = first.dropout(F.gelu(stacked_linear([head.dense for head in heads], features)))
        return stacked_linear([head.classifier for head in heads], features)


def stacked_linear(modules: list[nn.Linear], inputs: torch.Tensor) -> torch.Tensor:
    """Each module on its own slice of the inputs: (modules, batch, in) to (modules, batch, out)."""
    weights = torch.stack([module.weight for module in modules])
    biases = torch.stack([module.bias for module in modules]).unsqueeze(1)
    if weights.requires_grad:
        # Its gradient is transposed: copied once here, it is not copied for every module.
        weights.register_hook(torch.Tensor.contiguous)
    return torch.baddbmm(biases, inputs, weights.mT)


def stacked_layer_norm(modules: list[nn.LayerNorm], inputs: torch.Tensor) -> torch.Tensor:
    """Each module on its own slice of the inputs: (modules, batch, width) to the same shape."""
    weights = torch.stack([module.weight for module in modules]).unsqueeze(1)
    biases = torch.stack([module.bias for module in modules]).unsqueeze(1)
    return torch.addcmul(biases, F.layer_norm(inputs, modules[0].normalized_shape, eps=modules[0].eps), weights)


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
    """Return `tensor`, whose gradient is multiplied by `scale` in the backward pass."""
    return tensor if scale == 1 else _ScaleGradient.apply(tensor, scale)
