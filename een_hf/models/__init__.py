"""Early-exit models: all that a saved model needs to run."""

from .auto import MODEL_CLASSES, AutoEarlyExitModel, register_architecture
from .configuration_een import (
    EarlyExitBeitConfig,
    EarlyExitBertConfig,
    EarlyExitCamembertConfig,
    EarlyExitDebertaConfig,
    EarlyExitDebertaV2Config,
    EarlyExitDeiTConfig,
    EarlyExitDinov2Config,
    EarlyExitDinov2WithRegistersConfig,
    EarlyExitDistilBertConfig,
    EarlyExitElectraConfig,
    EarlyExitModernBertConfig,
    EarlyExitMPNetConfig,
    EarlyExitRobertaConfig,
    EarlyExitViTConfig,
    EarlyExitXLMRobertaConfig,
    ExitConfigurationError,
)
from .exits import register_exit_head, register_pooling
from .modeling_een import EarlyExitClassifierOutput, EarlyExitImageMixin, EarlyExitMixin, EarlyExitTextMixin
from .modeling_een_beit import EarlyExitBeitForImageClassification
from .modeling_een_bert import EarlyExitBertForSequenceClassification
from .modeling_een_deberta import EarlyExitDebertaForSequenceClassification
from .modeling_een_deberta_v2 import EarlyExitDebertaV2ForSequenceClassification
from .modeling_een_deit import EarlyExitDeiTForImageClassification
from .modeling_een_dinov2 import EarlyExitDinov2ForImageClassification
from .modeling_een_dinov2_with_registers import EarlyExitDinov2WithRegistersForImageClassification
from .modeling_een_distilbert import EarlyExitDistilBertForSequenceClassification
from .modeling_een_electra import EarlyExitElectraForSequenceClassification
from .modeling_een_modernbert import EarlyExitModernBertForSequenceClassification
from .modeling_een_mpnet import EarlyExitMPNetForSequenceClassification
from .modeling_een_roberta import (
    EarlyExitCamembertForSequenceClassification,
    EarlyExitRobertaForSequenceClassification,
    EarlyExitXLMRobertaForSequenceClassification,
)
from .modeling_een_vit import EarlyExitViTForImageClassification
from .policies import ExitPolicy, register_criterion


for _model_class in (
    EarlyExitBertForSequenceClassification,
    EarlyExitRobertaForSequenceClassification,
    EarlyExitXLMRobertaForSequenceClassification,
    EarlyExitCamembertForSequenceClassification,
    EarlyExitDistilBertForSequenceClassification,
    EarlyExitElectraForSequenceClassification,
    EarlyExitMPNetForSequenceClassification,
    EarlyExitModernBertForSequenceClassification,
    EarlyExitDebertaForSequenceClassification,
    EarlyExitDebertaV2ForSequenceClassification,
    EarlyExitViTForImageClassification,
    EarlyExitDeiTForImageClassification,
    EarlyExitDinov2ForImageClassification,
    EarlyExitDinov2WithRegistersForImageClassification,
    EarlyExitBeitForImageClassification,
):
    register_architecture(_model_class)

__all__ = [
    "EarlyExitBeitConfig",
    "EarlyExitBeitForImageClassification",
    "EarlyExitBertConfig",
    "EarlyExitBertForSequenceClassification",
    "EarlyExitCamembertConfig",
    "EarlyExitCamembertForSequenceClassification",
    "EarlyExitClassifierOutput",
    "EarlyExitDebertaConfig",
    "EarlyExitDebertaForSequenceClassification",
    "EarlyExitDebertaV2Config",
    "EarlyExitDebertaV2ForSequenceClassification",
    "EarlyExitDeiTConfig",
    "EarlyExitDeiTForImageClassification",
    "EarlyExitDinov2Config",
    "EarlyExitDinov2ForImageClassification",
    "EarlyExitDinov2WithRegistersConfig",
    "EarlyExitDinov2WithRegistersForImageClassification",
    "EarlyExitDistilBertConfig",
    "EarlyExitDistilBertForSequenceClassification",
    "EarlyExitElectraConfig",
    "EarlyExitElectraForSequenceClassification",
    "EarlyExitMPNetConfig",
    "EarlyExitMPNetForSequenceClassification",
    "EarlyExitImageMixin",
    "EarlyExitMixin",
    "EarlyExitTextMixin",
    "EarlyExitModernBertConfig",
    "EarlyExitModernBertForSequenceClassification",
    "EarlyExitRobertaConfig",
    "EarlyExitRobertaForSequenceClassification",
    "EarlyExitViTConfig",
    "EarlyExitViTForImageClassification",
    "EarlyExitXLMRobertaConfig",
    "EarlyExitXLMRobertaForSequenceClassification",
    "ExitConfigurationError",
    "ExitPolicy",
    "MODEL_CLASSES",
    "AutoEarlyExitModel",
    "register_architecture",
    "register_criterion",
    "register_exit_head",
    "register_pooling",
]
