"""Moved to `een_hf.training.callbacks`."""

from ._moved import moved_module


moved_module(__name__, "een_hf.training.callbacks")
