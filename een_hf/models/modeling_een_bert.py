"""BERT with early exits."""

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertModel, BertPreTrainedModel

from .configuration_een import EarlyExitBertConfig
from .modeling_een import EarlyExitTextMixin


class EarlyExitBertForSequenceClassification(EarlyExitTextMixin, BertPreTrainedModel):
    """`BertForSequenceClassification` with an exit after each of `config.exit_layers`.

    Loads any BERT checkpoint, with or without a fine-tuned head; the stock head is the last exit.

    Args:
        config: the model's config.

    Example:
        >>> model_class = een_hf.EarlyExitBertForSequenceClassification
        >>> model = model_class.from_pretrained("my-finetuned-bert", exit_layers=[1, 3])
        >>> outputs = model(**tokenizer("A fine film.", return_tensors="pt"))
        >>> outputs.exit_logits.shape  # batch, exits, labels
        torch.Size([1, 2, 2])
    """

    config: EarlyExitBertConfig
    config_class = EarlyExitBertConfig

    def __init__(self, config: EarlyExitBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(config.exit_dropout)
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
