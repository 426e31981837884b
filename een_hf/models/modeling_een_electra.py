"""ELECTRA with early exits."""

import torch
from torch import nn
from transformers.models.electra.modeling_electra import (
    ElectraClassificationHead,
    ElectraModel,
    ElectraPreTrainedModel,
)

from .configuration_een import EarlyExitElectraConfig
from .modeling_een import EarlyExitTextMixin
from .stages import Examples


class EarlyExitElectraForSequenceClassification(EarlyExitTextMixin, ElectraPreTrainedModel):
    """`ElectraForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitElectraConfig
    config_class = EarlyExitElectraConfig

    def __init__(self, config: EarlyExitElectraConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.electra = ElectraModel(config)
        self.classifier = ElectraClassificationHead(config)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.electra.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.classifier]

    def embed(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None
    ) -> Examples:
        examples = super().embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if hasattr(self.electra, "embeddings_project"):  # embeddings may be narrower than the layers
            examples.hidden = self.electra.embeddings_project(examples.hidden)
        return examples

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # The stock head takes the first position of what it is given.
        return self.classifier(self.pool_last(hidden, attention_mask).unsqueeze(1))
