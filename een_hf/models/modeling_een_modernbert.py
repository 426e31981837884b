"""ModernBERT with early exits."""

import torch
from torch import nn
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertAttention,
    ModernBertModel,
    ModernBertPredictionHead,
    ModernBertPreTrainedModel,
)

from .configuration_een import EarlyExitModernBertConfig
from .exits import NormedExitHead
from .modeling_een import EarlyExitUntypedTextMixin, LayerOutput
from .stages import Examples, bidirectional_mask


class _Backbone(ModernBertModel):
    _can_record_outputs = {"attentions": ModernBertAttention}  # hidden states: see `run_layer`


class EarlyExitModernBertForSequenceClassification(EarlyExitUntypedTextMixin, ModernBertPreTrainedModel):
    """`ModernBertForSequenceClassification` with an exit after each of `config.exit_layers`."""

    config: EarlyExitModernBertConfig
    config_class = EarlyExitModernBertConfig
    head_class = NormedExitHead
    _can_record_outputs = {"hidden_states": LayerOutput, "attentions": ModernBertAttention}

    def __init__(self, config: EarlyExitModernBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = _Backbone(config)
        self.head = ModernBertPredictionHead(config)
        self.drop = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.layer_output = LayerOutput()
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def answers_left_padding(self) -> bool:
        # In eager attention a token whose window holds only padding attends to all columns, however many there are.
        windows = "sliding_attention" in self.config.layer_types
        return not (windows and self.config._attn_implementation == "eager" and self.reads_first_token)

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.head, self.classifier]

    def embed(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.model.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        per_token = {} if position_ids is None else {"position_ids": position_ids.expand(len(hidden), -1)}
        return Examples(hidden, attention_mask, per_token)

    def make_context(self, examples: Examples) -> dict[str, dict]:
        """As in `EarlyExitMixin`: for each kind of layer its mask and its rotary tables."""
        hidden, config = examples.hidden, self.config
        positions = examples.per_token.get("position_ids")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        return {
            kind: {
                "attention_mask": bidirectional_mask(config, examples, windows[kind]),
                "position_embeddings": self.model.rotary_emb(hidden, positions, kind),
            }
            for kind in sorted(set(config.layer_types))
        }

    def run_layer(self, depth, hidden, context, **kwargs) -> torch.Tensor:
        after = self.backbone_layers[depth](hidden, **context[self.config.layer_types[depth]], **kwargs)
        if depth == self.config.num_hidden_layers - 1:
            after = self.model.final_norm(after)  # what the stock model calls its last hidden state
        return self.layer_output(hidden, after)[0]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.classifier(self.drop(self.head(self.pool_last(hidden, attention_mask))))
