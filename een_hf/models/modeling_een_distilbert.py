"""DistilBERT with early exits."""

import torch
from torch import nn
from transformers.models.distilbert.modeling_distilbert import DistilBertModel, DistilBertPreTrainedModel

from .configuration_een import EarlyExitDistilBertConfig
from .modeling_een import EarlyExitUntypedTextMixin


class EarlyExitDistilBertForSequenceClassification(EarlyExitUntypedTextMixin, DistilBertPreTrainedModel):
    """`DistilBertForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitDistilBertConfig
    config_class = EarlyExitDistilBertConfig

    def __init__(self, config: EarlyExitDistilBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.distilbert = DistilBertModel(config)
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.num_labels)
        self.dropout = nn.Dropout(config.exit_dropout)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.distilbert.transformer.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.pre_classifier, self.classifier]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        pooled = self.pre_classifier(self.pool_last(hidden, attention_mask)).relu()
        return self.classifier(self.dropout(pooled))
