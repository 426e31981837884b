"""ViT with early exits."""

import torch
from torch import nn
from transformers.models.vit.modeling_vit import ViTModel, ViTPreTrainedModel

from .configuration_een import EarlyExitViTConfig
from .modeling_een import EarlyExitImageMixin
from .patches import project_by_product


class EarlyExitViTForImageClassification(EarlyExitImageMixin, ViTPreTrainedModel):
    """`ViTForImageClassification` with an exit after each of `config.exit_layers`.

    Loads any ViT checkpoint, with or without a fine-tuned head; the stock head is the last exit.

    Args:
        config: the model's config.

    Example:
        >>> model_class = een_hf.EarlyExitViTForImageClassification
        >>> model = model_class.from_pretrained("my-finetuned-vit", exit_layers=[1, 3])
        >>> model.num_exits
        2
    """

    config: EarlyExitViTConfig
    config_class = EarlyExitViTConfig

    def __init__(self, config: EarlyExitViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        project_by_product(self.vit.embeddings)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.vit.layers

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.vit.layernorm, self.classifier]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.vit.layernorm(self.pool_last(hidden, attention_mask)))
