"""DeBERTa of the second and third version with early exits."""

import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Model, DebertaV2PreTrainedModel

from .configuration_een import EarlyExitDebertaV2Config
from .modeling_een_deberta import DisentangledTextMixin


class EarlyExitDebertaV2ForSequenceClassification(DisentangledTextMixin, DebertaV2PreTrainedModel):
    """`DebertaV2ForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitDebertaV2Config
    config_class = EarlyExitDebertaV2Config
    backbone_class = DebertaV2Model

    def relative_positions(self, distances: torch.Tensor) -> torch.Tensor:
        """As in `DisentangledTextMixin`: distances up to half of the buckets, on a logarithmic scale beyond.

        The stock function copies numbers from the host, which cannot be captured in a CUDA graph.
        """
        encoder = self.deberta.encoder
        if not (encoder.relative_attention and encoder.position_buckets > 0 and encoder.max_relative_positions > 0):
            return distances
        middle = encoder.position_buckets // 2
        widest = float(torch.tensor((encoder.max_relative_positions - 1) / middle).log())  # in float32, as stock
        far = distances.abs().clamp(min=middle - 1) / middle
        logarithmic = (torch.ceil(far.log() / widest * (middle - 1)) + middle) * distances.sign()
        return torch.where(distances.abs() <= middle, distances, logarithmic.long())

    def finish_first_layer(self, before: torch.Tensor, after: torch.Tensor, context: dict) -> torch.Tensor:
        if self.deberta.encoder.conv is None:
            return after
        tokens = context["attention_mask"].diagonal(dim1=-2, dim2=-1).squeeze(1)
        return self.deberta.encoder.conv(before, after, tokens)
