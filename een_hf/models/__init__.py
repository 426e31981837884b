"""Early-exit models: all that a saved model needs to run."""

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from .configuration_een import EarlyExitBertConfig, EarlyExitViTConfig, ExitConfigurationError
from .modeling_een import EarlyExitClassifierOutput, EarlyExitMixin
from .modeling_een_bert import EarlyExitBertForSequenceClassification
from .modeling_een_vit import EarlyExitViTForImageClassification
from .policies import ExitPolicy


MODEL_CLASSES: dict[str, type[EarlyExitMixin]] = {}  # by the type of the stock model


def register_architecture(model_class: type[EarlyExitMixin]) -> type[EarlyExitMixin]:
    """Class decorator: make an early-exit class known to the scripts, the commands and transformers' Auto classes."""
    config_class = model_class.config_class
    images = model_class.main_input_name == "pixel_values"
    auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    MODEL_CLASSES[config_class.stock_model_type] = model_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
    # What is saved takes the files of this folder along, and so runs where een_hf is not installed.
    config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class)
    return model_class


for _model_class in (EarlyExitBertForSequenceClassification, EarlyExitViTForImageClassification):
    register_architecture(_model_class)

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
    "register_architecture",
]
