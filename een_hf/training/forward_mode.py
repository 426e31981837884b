"""Moved to `een_hf.training.l2w.forward_mode`."""

from .._moved import moved_module


moved_module(__name__, "een_hf.training.l2w.forward_mode")
