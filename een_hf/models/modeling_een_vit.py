"""ViT with early exits."""

import torch
from torch import nn
from transformers.models.vit.modeling_vit import ViTModel, ViTPreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from .configuration_een import EarlyExitViTConfig
from .exits import ViTExitHead
from .modeling_een import EarlyExitClassifierOutput, EarlyExitMixin
from .patches import project_by_product
from .policies import ExitPolicy
from .stages import Examples


class EarlyExitViTForImageClassification(EarlyExitMixin, ViTPreTrainedModel):
    """`ViTForImageClassification` with an exit after each of `config.exit_layers`.

    Loads any ViT checkpoint, with or without a fine-tuned head; the stock head is the last exit.

    Example:
        >>> model = EarlyExitViTForImageClassification.from_pretrained("my-finetuned-vit", exit_layers=[3, 6, 9])
    """

    config: EarlyExitViTConfig
    config_class = EarlyExitViTConfig
    head_class = ViTExitHead

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

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Take images of another height and width, a multiple of the patch size: position embeddings are resized."""
        embeddings, patches = self.vit.embeddings, self.vit.embeddings.patch_embeddings
        count = (image_size // self.config.patch_size) ** 2
        shaped = embeddings.position_embeddings.new_empty(1, count + 1, self.config.hidden_size)
        resized = embeddings.interpolate_pos_encoding(shaped, image_size, image_size)
        embeddings.position_embeddings = nn.Parameter(resized.clone())
        embeddings.image_size = patches.image_size = (image_size, image_size)
        patches.num_patches = count
        self.config.image_size = image_size

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.vit.layernorm(self.pool_last(hidden, attention_mask)))

    def embed(self, pixel_values=None, interpolate_pos_encoding=None) -> Examples:
        if pixel_values is None:
            raise ValueError("Give pixel_values.")
        pixel_values = pixel_values.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype)
        return Examples(self.vit.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify; inputs as in `ViTForImageClassification`, `early_exit` as in `EarlyExitMixin.run_exits`."""
        return self.run_exits(self.embed(pixel_values, interpolate_pos_encoding), labels, early_exit, **kwargs)
