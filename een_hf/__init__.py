"""Early exits for Hugging Face encoders."""

from ._deprecated import find_old_modules
from .extras import imported_on_use
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
__getattr__ = imported_on_use(
    __name__,
    {
        "calibration": ("calibrate",),
        "data": ("partition_dataset",),
        "evaluation": ("compare", "relative_costs"),
        "inference": ("ExitRunner", "predict"),
        "inference.onnx": ("export_onnx",),
        "inference.quantization": ("GraphCalibration",),
        "retrofitting": ("RetrofitReport", "retrofit"),
        "runs": ("calibrate_run",),
        "training": (
            "BoostedExitTrainer",
            "EarlyExitTrainer",
            "EarlyExitTrainingArguments",
            "JointExitTrainer",
            "MetaWeightedExitTrainer",
            "TwoStageExitTrainer",
            "register_scheme",
        ),
    },
)

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
