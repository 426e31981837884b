"""Serving: an asynchronous engine whose deeper stages are shared by the rows of many requests, and a server.

The server is imported on first use: it needs the extra `serve`, the engine does not.
"""

import importlib

from ..extras import named_extras
from .auditing import Auditor
from .engine import AsyncExitEngine, EngineBusyError, EngineClosedError, ExitAnswers
from .stages import EngineObserver


_LAZY = {"PrometheusObserver": "metrics", "ServerLimits": "server", "create_app": "server"}

__all__ = [
    "AsyncExitEngine",
    "Auditor",
    "EngineBusyError",
    "EngineClosedError",
    "EngineObserver",
    "ExitAnswers",
    "PrometheusObserver",
    "ServerLimits",
    "create_app",
]


def __getattr__(name: str):
    if name in _LAZY:
        with named_extras():
            return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
