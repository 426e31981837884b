"""BERT with early exits."""

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertModel, BertPreTrainedModel
from transformers.utils.output_capturing import capture_outputs

from .configuration_een import EarlyExitBertConfig
from .exits import BertExitHead
from .modeling_een import EarlyExitClassifierOutput, EarlyExitMixin
from .policies import ExitPolicy
from .stages import Examples


class EarlyExitBertForSequenceClassification(EarlyExitMixin, BertPreTrainedModel):
    """`BertForSequenceClassification` with an exit after each of `config.exit_layers`.

    Loads any BERT checkpoint, with or without a fine-tuned head; the stock head is the last exit.

    Example:
        >>> model = EarlyExitBertForSequenceClassification.from_pretrained("my-finetuned-bert", exit_layers=[3, 6, 9])
    """

    config: EarlyExitBertConfig
    config_class = EarlyExitBertConfig
    head_class = BertExitHead

    def __init__(self, config: EarlyExitBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.bert.encoder.layer

    @property
    def last_head_modules(self) -> list[nn.Module]:
        return [self.bert.pooler, self.classifier]

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # The stock pooler takes the first position of what it is given.
        pooled = self.bert.pooler(self.pool_last(hidden, attention_mask).unsqueeze(1))
        return self.classifier(self.dropout(pooled))

    def embed(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None
    ) -> Examples:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden = self.bert.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return Examples(hidden, attention_mask)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify; inputs as in `BertForSequenceClassification`, `early_exit` as in `EarlyExitMixin.run_exits`."""
        examples = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run_exits(examples, labels, early_exit, **kwargs)
