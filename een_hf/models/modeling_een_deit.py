"""DeiT with early exits, with and without a classifier on the distillation token."""

import torch
from torch import nn
from transformers.models.deit.modeling_deit import DeiTModel, DeiTPreTrainedModel

from .configuration_een import EarlyExitDeiTConfig
from .modeling_een import EarlyExitImageMixin
from .patches import project_by_product


class EarlyExitDeiTForImageClassification(EarlyExitImageMixin, DeiTPreTrainedModel):
    """`DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher` with exits.

    The second is taken where the checkpoint is one (`config.distillation_head`).
    """

    config: EarlyExitDeiTConfig
    config_class = EarlyExitDeiTConfig

    def __init__(self, config: EarlyExitDeiTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deit = DeiTModel(config, add_pooling_layer=False)
        project_by_product(self.deit.embeddings)
        names = ["cls_classifier", "distillation_classifier"] if config.distillation_head else ["classifier"]
        for name in names:
            setattr(self, name, nn.Linear(config.hidden_size, config.num_labels))
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.deit.layers

    @property
    def last_head_modules(self) -> list[nn.Module]:
        if self.config.distillation_head:
            return [self.deit.layernorm, self.distillation_classifier, self.cls_classifier]
        return [self.deit.layernorm, self.classifier]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.distillation_head:
            cls, distillation = self.deit.layernorm(hidden[:, :2]).unbind(1)
            return (self.cls_classifier(cls) + self.distillation_classifier(distillation)) / 2
        return self.classifier(self.deit.layernorm(self.pool_last(hidden, attention_mask)))
