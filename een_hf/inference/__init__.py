"""Running early-exit models: whole data sets and single batches."""

from .batches import ExitBatchPredictor
from .engine import ExitEngine
from .loading import load_early_exit_model
from .predict import ExitPredictions, pad_rows, predict
from .runner import ExitRunner


__all__ = [
    "ExitBatchPredictor",
    "ExitEngine",
    "ExitPredictions",
    "ExitRunner",
    "load_early_exit_model",
    "pad_rows",
    "predict",
]
