"""Parts from outside the package, as a user's module would hold them; `test_registries.py` names them."""

import torch
from torch import nn

from een_hf import register_criterion, register_pooling
from een_hf.models import ExitCriterion, ExitHead


class PlainHead(ExitHead):
    """One linear layer; registers itself by no decorator."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Linear(self.width, config.num_labels)

    def classify(self, pooled):
        return self.classifier(pooled)


@register_criterion("squared")
class SquaredConfidence(ExitCriterion):
    """The squared length of the vector of probabilities."""

    def step(self, logits, state):
        return logits.softmax(-1).square().sum(-1), state


@register_pooling("max_cls", width=2)
def max_cls(hidden, attention_mask, num_prefix_tokens):
    """The largest value over the tokens, and the first token."""
    if attention_mask is not None:
        hidden = hidden.masked_fill(attention_mask.unsqueeze(-1) == 0, torch.finfo(hidden.dtype).min)
    return torch.cat([hidden[:, num_prefix_tokens:].amax(1), hidden[:, 0]], -1)
