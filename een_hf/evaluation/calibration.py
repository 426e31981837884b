"""Moved to `een_hf.calibration`."""

from .._moved import moved_module


moved_module(__name__, "een_hf.calibration")
