"""BEiT with early exits."""

import torch
from torch import nn
from transformers.models.beit.modeling_beit import BeitModel, BeitPreTrainedModel, BeitRelativePositionBias

from .configuration_een import EarlyExitBeitConfig
from .modeling_een import EarlyExitImageMixin
from .patches import project_by_product
from .stages import Examples


class _BiasOnDevice(BeitRelativePositionBias):
    """Keeps its index beside its table: copied from the host in each layer, it would keep a CUDA graph out."""

    _index = (None, None)

    def generate_relative_position_index(self, window_size: tuple[int, int]) -> torch.Tensor:
        key = (tuple(window_size), self.relative_position_bias_table.device)
        if self._index[0] != key:
            self._index = key, super().generate_relative_position_index(key[0]).to(key[1])
        return self._index[1]


class EarlyExitBeitForImageClassification(EarlyExitImageMixin, BeitPreTrainedModel):
    """`BeitForImageClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitBeitConfig
    config_class = EarlyExitBeitConfig

    def __init__(self, config: EarlyExitBeitConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.beit = BeitModel(config)
        project_by_product(self.beit.embeddings)
        for module in self._biases():
            module.__class__ = _BiasOnDevice
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    def _biases(self) -> list[BeitRelativePositionBias]:
        return [module for module in self.beit.modules() if isinstance(module, BeitRelativePositionBias)]

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.beit.layers

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.beit.layernorm, self.beit.pooler, self.classifier]

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        super().set_image_size(image_size)
        for module in self._biases():
            resized = BeitRelativePositionBias(self.config)
            sizes = [2 * side - 1 for side in module.window_size], [2 * side - 1 for side in resized.window_size]
            inner, rest = module.relative_position_bias_table[:-3], module.relative_position_bias_table[-3:]
            grid = inner.T.reshape(1, -1, *sizes[0])
            grid = nn.functional.interpolate(grid, size=sizes[1], mode="bilinear")  # as the stock layer resizes it
            module.relative_position_bias_table = nn.Parameter(torch.cat([grid.flatten(2)[0].T, rest]))
            module.window_size, module.num_relative_distance = resized.window_size, resized.num_relative_distance

    def embed(self, pixel_values=None, interpolate_pos_encoding=None) -> Examples:
        examples = Examples(self.beit.embeddings(self.check_images(pixel_values)))
        # What layers need is the shape of the images alone; a tensor without numbers carries it.
        examples.per_example["image"] = examples.hidden.new_empty(len(examples), 0, *pixel_values.shape[-2:])
        return examples

    def make_context(self, examples: Examples) -> dict:
        height, width = examples.per_example["image"].shape[-2:]
        context = {"attention_mask": None, "resolution": (height, width)}
        if self.beit.shared_position_bias is not None:
            patch, length = self.config.patch_size, examples.hidden.shape[1]
            window = (height // patch, width // patch)
            context["attention_mask"] = self.beit.shared_position_bias(window, dim_size=length)
        return context

    def run_layer(self, depth, hidden, context, **kwargs) -> torch.Tensor:
        return self.backbone_layers[depth](hidden, **context, **kwargs)

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.beit.pooler(self.beit.layernorm(hidden)))
