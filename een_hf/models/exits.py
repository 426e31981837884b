"""Exit heads, what they read, and how exits add up."""

import torch
from torch import nn


def pool_hidden_states(hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Reduce hidden states to one vector per row.

    Args:
        hidden: (batch, length, hidden_size).
        attention_mask: (batch, length), 1 for tokens and 0 for padding; `None` means no padding.
        pooling: `cls` (the first position) or `mean` (over the unmasked positions).

    Returns:
        (batch, hidden_size)
    """
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class BertExitHead(nn.Module):
    """Pooler (dense, tanh), dropout and linear: the stock classification head of BERT. (batch, hidden) to logits."""

    def __init__(self, config):
        super().__init__()
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(torch.tanh(self.dense(pooled))))


class ViTExitHead(nn.Module):
    """Layer norm and linear: the stock classification head of ViT. (batch, hidden) to logits."""

    def __init__(self, config):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.layernorm(pooled))


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
