"""MobileBERT with early exits: an adapter from outside the package, in one file, as README shows it."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import MobileBertConfig, MobileBertModel, MobileBertPreTrainedModel

from een_hf import EarlyExitTextMixin, register_architecture
from een_hf.models import EarlyExitConfigMixin


@strict
class EarlyExitMobileBertConfig(EarlyExitConfigMixin, MobileBertConfig):
    model_type = "een_mobilebert"
    stock_model_type = "mobilebert"


@register_architecture
class EarlyExitMobileBertForSequenceClassification(EarlyExitTextMixin, MobileBertPreTrainedModel):
    config: EarlyExitMobileBertConfig
    config_class = EarlyExitMobileBertConfig

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        # The modules of the stock classifier, under its names.
        self.mobilebert = MobileBertModel(config)
        self.dropout = nn.Dropout(config.exit_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self):
        return self.mobilebert.encoder.layer

    @property
    def last_head_modules(self):
        return [self.mobilebert.pooler, self.classifier]

    def last_head(self, hidden, attention_mask):
        # The stock pooler takes the first position of what it is given.
        pooled = self.mobilebert.pooler(self.pool_last(hidden, attention_mask).unsqueeze(1))
        return self.classifier(self.dropout(pooled))
