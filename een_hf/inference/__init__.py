"""Running early-exit models: whole data sets and single batches."""

from .engine import ExitEngine
from .predict import ExitPredictions, pad_rows, predict
from .runner import ExitRunner


__all__ = ["ExitEngine", "ExitPredictions", "ExitRunner", "pad_rows", "predict"]
