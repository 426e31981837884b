"""Serving: an asynchronous engine whose deeper stages are shared by the rows of many requests."""

from .engine import AsyncExitEngine, EngineBusyError, EngineClosedError
from .stages import EngineObserver


__all__ = ["AsyncExitEngine", "EngineBusyError", "EngineClosedError", "EngineObserver"]
