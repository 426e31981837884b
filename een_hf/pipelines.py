"""Moved to `een_hf.inference.pipelines`."""

from ._moved import moved_module


moved_module(__name__, "een_hf.inference.pipelines")
