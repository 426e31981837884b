"""Running early-exit models: whole data sets and single batches."""

from .engine import ExitEngine
from .predict import ExitPredictions, pad_rows, predict


__all__ = ["ExitEngine", "ExitPredictions", "pad_rows", "predict"]
