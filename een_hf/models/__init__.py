"""Early-exit models: all that a saved model needs to run."""

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from .configuration_een import EarlyExitBertConfig, EarlyExitViTConfig, ExitConfigurationError
from .modeling_een import EarlyExitClassifierOutput, EarlyExitMixin
from .modeling_een_bert import EarlyExitBertForSequenceClassification
from .modeling_een_vit import EarlyExitViTForImageClassification
from .policies import ExitPolicy


MODEL_CLASSES = {
    "bert": EarlyExitBertForSequenceClassification,
    "vit": EarlyExitViTForImageClassification,
}
for _model_class, _auto_class in (
    (EarlyExitBertForSequenceClassification, AutoModelForSequenceClassification),
    (EarlyExitViTForImageClassification, AutoModelForImageClassification),
):
    AutoConfig.register(_model_class.config_class.model_type, _model_class.config_class, exist_ok=True)
    _auto_class.register(_model_class.config_class, _model_class, exist_ok=True)
    # What is saved takes the files of this folder along, and so runs where een_hf is not installed.
    _model_class.config_class.register_for_auto_class()
    _model_class.register_for_auto_class(_auto_class)

__all__ = [
    "MODEL_CLASSES",
    "EarlyExitBertConfig",
    "EarlyExitBertForSequenceClassification",
    "EarlyExitClassifierOutput",
    "EarlyExitMixin",
    "EarlyExitViTConfig",
    "EarlyExitViTForImageClassification",
    "ExitConfigurationError",
    "ExitPolicy",
]
