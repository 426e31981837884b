"""Inference with early-exit models, of whole data sets and of single batches."""

from .batches import ExitBatchPredictor
from .engine import ExitEngine
from .loading import load_early_exit_model
from .predict import ExitPredictions, predict
from .rows import pad_rows
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
