"""RoBERTa, XLM-RoBERTa and CamemBERT with early exits: one network under three names."""

import torch
from torch import nn
from transformers.models.roberta.modeling_roberta import (
    RobertaClassificationHead,
    RobertaModel,
    RobertaPreTrainedModel,
)

from .configuration_een import EarlyExitCamembertConfig, EarlyExitRobertaConfig, EarlyExitXLMRobertaConfig
from .modeling_een import EarlyExitTextMixin


class EarlyExitRobertaForSequenceClassification(EarlyExitTextMixin, RobertaPreTrainedModel):
    """`RobertaForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitRobertaConfig
    config_class = EarlyExitRobertaConfig

    def __init__(self, config: EarlyExitRobertaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.roberta.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.classifier]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # The stock head takes the first position of what it is given.
        return self.classifier(self.pool_last(hidden, attention_mask).unsqueeze(1))


class EarlyExitXLMRobertaForSequenceClassification(EarlyExitRobertaForSequenceClassification):
    """`XLMRobertaForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitXLMRobertaConfig
    config_class = EarlyExitXLMRobertaConfig


class EarlyExitCamembertForSequenceClassification(EarlyExitRobertaForSequenceClassification):
    """`CamembertForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitCamembertConfig
    config_class = EarlyExitCamembertConfig
