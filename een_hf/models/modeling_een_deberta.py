"""DeBERTa with early exits, and what it shares with the second version."""

import torch
from torch import nn
from transformers.models.deberta.modeling_deberta import (
    ContextPooler,
    DebertaModel,
    DebertaPreTrainedModel,
)

from .configuration_een import EarlyExitDebertaConfig
from .modeling_een import EarlyExitTextMixin, LayerOutput
from .stages import Examples


class DisentangledTextMixin(EarlyExitTextMixin):
    """`EarlyExitTextMixin` for both DeBERTa: the stock head, and layers that read relative positions."""

    backbone_class: type[nn.Module]
    _can_record_outputs = {"hidden_states": LayerOutput, "attentions": LayerOutput}

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = self.backbone_class(config)
        self.pooler = ContextPooler(config)
        self.classifier = nn.Linear(self.pooler.output_dim, config.num_labels)
        self.dropout = nn.Dropout(config.exit_dropout)
        self.layer_output = LayerOutput()
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def answers_left_padding(self) -> bool:
        # A token of padding attends to all columns, so that its hidden state depends on how many there are.
        return not self.reads_first_token

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.deberta.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.pooler, self.classifier]

    def embed(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None
    ) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.deberta.embeddings(input_ids, token_type_ids, position_ids, attention_mask, inputs_embeds)
        return Examples(hidden, attention_mask)

    def relative_positions(self, distances: torch.Tensor) -> torch.Tensor:
        """Convert distances between positions to what the layers read.

        Args:
            distances: (length, length), int64, from the position of the second axis to that of the first.

        Returns:
            (length, length), int64.
        """
        return distances

    def make_context(self, examples: Examples) -> dict[str, torch.Tensor | None]:
        hidden, encoder = examples.hidden, self.deberta.encoder
        mask = hidden.new_ones(1, hidden.shape[1]) if examples.attention_mask is None else examples.attention_mask
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        relative = self.relative_positions(positions[:, None] - positions).unsqueeze(0)
        return {
            "attention_mask": encoder.get_attention_mask((mask != 0).long()),
            "relative_pos": relative if encoder.relative_attention else None,
            "rel_embeddings": encoder.get_rel_embedding(),
        }

    def run_layer(self, depth, hidden, context, output_attentions=None, **kwargs) -> torch.Tensor:
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        after, attention = self.backbone_layers[depth](hidden, **context, output_attentions=wanted)
        if depth == 0:
            after = self.finish_first_layer(hidden, after, context)
        return self.layer_output(hidden, after, attention)[0]

    def finish_first_layer(self, before: torch.Tensor, after: torch.Tensor, context: dict) -> torch.Tensor:
        """What the encoder does after its first layer; by default nothing.

        Args:
            before: hidden states before the layer (batch, length, hidden_size).
            after: hidden states after it, of the same shape.
            context: what `make_context` returned.

        Returns:
            the hidden states for the second layer, of the same shape.
        """
        return after

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # The stock pooler takes the first position of what it is given.
        pooled = self.pooler(self.pool_last(hidden, attention_mask).unsqueeze(1))
        return self.classifier(self.dropout(pooled))


class EarlyExitDebertaForSequenceClassification(DisentangledTextMixin, DebertaPreTrainedModel):
    """`DebertaForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitDebertaConfig
    config_class = EarlyExitDebertaConfig
    backbone_class = DebertaModel
