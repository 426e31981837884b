"""DINOv2 with registers, with early exits."""

from torch import nn
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersModel,
    Dinov2WithRegistersPreTrainedModel,
)

from .configuration_een import EarlyExitDinov2WithRegistersConfig
from .modeling_een_dinov2 import Dinov2ImageMixin
from .patches import project_by_product


class EarlyExitDinov2WithRegistersForImageClassification(Dinov2ImageMixin, Dinov2WithRegistersPreTrainedModel):
    """`Dinov2WithRegistersForImageClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitDinov2WithRegistersConfig
    config_class = EarlyExitDinov2WithRegistersConfig

    def __init__(self, config: EarlyExitDinov2WithRegistersConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov2_with_registers = Dinov2WithRegistersModel(config)
        project_by_product(self.dinov2_with_registers.embeddings)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()
