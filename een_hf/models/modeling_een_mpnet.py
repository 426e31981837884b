"""MPNet with early exits."""

import torch
from torch import nn
from transformers.models.mpnet.modeling_mpnet import (
    MPNetClassificationHead,
    MPNetModel,
    MPNetPreTrainedModel,
)

from .configuration_een import EarlyExitMPNetConfig
from .modeling_een import EarlyExitUntypedTextMixin, LayerOutput
from .stages import Examples


class EarlyExitMPNetForSequenceClassification(EarlyExitUntypedTextMixin, MPNetPreTrainedModel):
    """`MPNetForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitMPNetConfig
    config_class = EarlyExitMPNetConfig
    _can_record_outputs = {"hidden_states": LayerOutput, "attentions": LayerOutput}

    def __init__(self, config: EarlyExitMPNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mpnet = MPNetModel(config, add_pooling_layer=False)
        self.classifier = MPNetClassificationHead(config)
        self.layer_output = LayerOutput()
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.mpnet.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.classifier]

    def make_context(self, examples: Examples) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As in `EarlyExitMixin`: the mask, and the bias of relative positions (1, heads, length, length)."""
        encoder, positions = self.mpnet.encoder, torch.arange(examples.hidden.shape[1], device=examples.hidden.device)
        bias = encoder.relative_attention_bias(encoder.relative_position_bucket(positions - positions[:, None]))
        return super().make_context(examples), bias.permute(2, 0, 1).unsqueeze(0)

    def run_layer(self, depth, hidden, context, output_attentions=None, **kwargs) -> torch.Tensor:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        return self.layer_output(hidden, *self.backbone_layers[depth](hidden, *context, output_attentions=wanted))[0]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # The stock head takes the first position of what it is given.
        return self.classifier(self.pool_last(hidden, attention_mask).unsqueeze(1))
