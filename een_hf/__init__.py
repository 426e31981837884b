"""Early exits for Hugging Face encoders."""

import importlib

from ._deprecated import find_old_modules
from .inference import pipelines  # noqa: F401, registers them
from .models import (
    AutoEarlyExitModel,
    EarlyExitBertConfig,
    EarlyExitBertForSequenceClassification,
    EarlyExitClassifierOutput,
    EarlyExitImageMixin,
    EarlyExitMixin,
    EarlyExitTextMixin,
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
    ExitConfigurationError,
    ExitError,
    ExitPolicy,
    register_architecture,
    register_criterion,
    register_exit_head,
    register_pooling,
)


__version__ = "0.2.0"

find_old_modules()

# Training and evaluation are imported on first use: a model that only predicts does not wait for them.
_LAZY = {
    "BoostedExitTrainer": ".training",
    "EarlyExitTrainer": ".training",
    "EarlyExitTrainingArguments": ".training",
    "ExitRunner": ".inference",
    "GraphCalibration": ".inference.quantization",
    "JointExitTrainer": ".training",
    "MetaWeightedExitTrainer": ".training",
    "RetrofitReport": ".retrofitting",
    "TwoStageExitTrainer": ".training",
    "calibrate": ".calibration",
    "calibrate_run": ".runs",
    "compare": ".evaluation",
    "export_onnx": ".inference.onnx",
    "partition_dataset": ".data",
    "predict": ".inference",
    "register_scheme": ".training",
    "relative_costs": ".evaluation",
    "retrofit": ".retrofitting",
}

__all__ = [
    "AutoEarlyExitModel",
    "BoostedExitTrainer",
    "EarlyExitBertConfig",
    "EarlyExitBertForSequenceClassification",
    "EarlyExitClassifierOutput",
    "EarlyExitImageMixin",
    "EarlyExitMixin",
    "EarlyExitTextMixin",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "EarlyExitViTConfig",
    "EarlyExitViTForImageClassification",
    "ExitConfigurationError",
    "ExitError",
    "ExitPolicy",
    "ExitRunner",
    "GraphCalibration",
    "JointExitTrainer",
    "MetaWeightedExitTrainer",
    "RetrofitReport",
    "TwoStageExitTrainer",
    "calibrate",
    "calibrate_run",
    "compare",
    "export_onnx",
    "partition_dataset",
    "predict",
    "register_architecture",
    "register_criterion",
    "register_exit_head",
    "register_pooling",
    "register_scheme",
    "relative_costs",
    "retrofit",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
