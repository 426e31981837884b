"""Serving: an asynchronous engine, in which rows of many requests run the deeper stages together, and a server.

The server is imported on first use, since it needs the extra `serve`; the engine does not.
"""

from ..extras import imported_on_use
from .auditing import Auditor
from .engine import AsyncExitEngine, EngineBusyError, EngineClosedError, ExitAnswers
from .stages import EngineObserver


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

__getattr__ = imported_on_use(__name__, {"metrics": ("PrometheusObserver",), "server": ("ServerLimits", "create_app")})
