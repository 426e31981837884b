"""Running early-exit models: whole data sets and single batches."""

from .batches import ExitBatchPredictor
from .engine import ExitEngine
from .predict import ExitPredictions, pad_rows, predict
from .runner import ExitRunner


__all__ = ["ExitBatchPredictor", "ExitEngine", "ExitPredictions", "ExitRunner", "pad_rows", "predict"]
