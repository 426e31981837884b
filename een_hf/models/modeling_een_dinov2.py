"""DINOv2 with early exits."""

import torch
from torch import nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model, Dinov2PreTrainedModel

from .configuration_een import EarlyExitDinov2Config
from .modeling_een import EarlyExitImageMixin
from .patches import project_by_product
from .stages import Examples


class Dinov2ImageMixin(EarlyExitImageMixin):
    """`EarlyExitImageMixin` for both DINOv2: positions are always interpolated, the stock head reads `cls_mean`."""

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.base_model.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.base_model.layernorm, self.classifier]

    def embed(self, pixel_values=None, interpolate_pos_encoding=None) -> Examples:
        return Examples(self.base_model.embeddings(self.check_images(pixel_values)))

    def run_layer(self, depth, hidden, context, **kwargs) -> torch.Tensor:
        return self.backbone_layers[depth](hidden)

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.pool_last(self.base_model.layernorm(hidden), attention_mask))


class EarlyExitDinov2ForImageClassification(Dinov2ImageMixin, Dinov2PreTrainedModel):
    """`Dinov2ForImageClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitDinov2Config
    config_class = EarlyExitDinov2Config

    def __init__(self, config: EarlyExitDinov2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov2 = Dinov2Model(config)
        project_by_product(self.dinov2.embeddings)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()
