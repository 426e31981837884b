"""Early-exit models: all that a saved model needs to run."""

import importlib

from .auto import MODEL_CLASSES, AutoEarlyExitModel, register_adapter, register_architecture
from .configuration_een import (
    EarlyExitBeitConfig,
    EarlyExitBertConfig,
    EarlyExitCamembertConfig,
    EarlyExitConfigMixin,
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
from .criteria import ExitCriterion, register_criterion
from .exits import ExitHead, register_exit_head, register_pooling
from .modeling_een import (
    EarlyExitClassifierOutput,
    EarlyExitImageMixin,
    EarlyExitMixin,
    EarlyExitTextMixin,
    EarlyExitUntypedTextMixin,
)
from .policies import ExitPolicy
from .registries import ExitError


# Each adapter with the stock modules that it needs is imported when its class, or a config of it, is asked for.
_ADAPTERS = dict(
    register_adapter(config_class, f"{__name__}.modeling_een_{file}", task)
    for config_class, file, task in (
        (EarlyExitBertConfig, "bert", "SequenceClassification"),
        (EarlyExitRobertaConfig, "roberta", "SequenceClassification"),
        (EarlyExitXLMRobertaConfig, "roberta", "SequenceClassification"),
        (EarlyExitCamembertConfig, "roberta", "SequenceClassification"),
        (EarlyExitDistilBertConfig, "distilbert", "SequenceClassification"),
        (EarlyExitElectraConfig, "electra", "SequenceClassification"),
        (EarlyExitMPNetConfig, "mpnet", "SequenceClassification"),
        (EarlyExitModernBertConfig, "modernbert", "SequenceClassification"),
        (EarlyExitDebertaConfig, "deberta", "SequenceClassification"),
        (EarlyExitDebertaV2Config, "deberta_v2", "SequenceClassification"),
        (EarlyExitViTConfig, "vit", "ImageClassification"),
        (EarlyExitDeiTConfig, "deit", "ImageClassification"),
        (EarlyExitDinov2Config, "dinov2", "ImageClassification"),
        (EarlyExitDinov2WithRegistersConfig, "dinov2_with_registers", "ImageClassification"),
        (EarlyExitBeitConfig, "beit", "ImageClassification"),
    )
)


def __getattr__(name: str):
    if name in _ADAPTERS:
        return getattr(importlib.import_module(_ADAPTERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EarlyExitBeitConfig",
    "EarlyExitBeitForImageClassification",
    "EarlyExitBertConfig",
    "EarlyExitBertForSequenceClassification",
    "EarlyExitCamembertConfig",
    "EarlyExitCamembertForSequenceClassification",
    "EarlyExitClassifierOutput",
    "EarlyExitConfigMixin",
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
    "EarlyExitUntypedTextMixin",
    "EarlyExitModernBertConfig",
    "EarlyExitModernBertForSequenceClassification",
    "EarlyExitRobertaConfig",
    "EarlyExitRobertaForSequenceClassification",
    "EarlyExitViTConfig",
    "EarlyExitViTForImageClassification",
    "EarlyExitXLMRobertaConfig",
    "EarlyExitXLMRobertaForSequenceClassification",
    "ExitConfigurationError",
    "ExitCriterion",
    "ExitError",
    "ExitHead",
    "ExitPolicy",
    "MODEL_CLASSES",
    "AutoEarlyExitModel",
    "register_architecture",
    "register_criterion",
    "register_exit_head",
    "register_pooling",
]
