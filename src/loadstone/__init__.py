"""Loadstone: an open language model answering from Python, on the machine you have, in the memory you allow.

Importing it is quick: torch and the rest come in when a name that needs them is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ConfigManager, GenerationConfig
    from .engine import Chunk, GenerationResult, Stream, ToolCall
    from .errors import (
        CheckpointError,
        ConfigurationError,
        ContextLengthError,
        GenerationError,
        LoadstoneError,
        ModelLoadError,
        ModelNotLoadedError,
        QueueFullError,
        ResourceError,
        SourceError,
        TransientSourceError,
        handle_exceptions,
    )
    from .forecast import Forecast, plan
    from .hardware import Device, DeviceManager, get_device_manager
    from .life import MemoryReport, Receipt
    from .manager import ModelManager, get_model_manager, load_qwen_model
    from .retry import retry_on_exception
    from .telemetry import Event, subscribe

__version__ = "0.1.0"

# GNU OpenMP, which torch brings on Linux, reads this when torch is first imported. Left alone its threads spin for
# milliseconds at the end of every product; when another program wants the core they spin their time away and the next
# product waits for its turn: 1 token a second where 20 are to be had. 3000 turns are about as long as the gap between
# two products, so on a quiet machine nothing is lost.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_HOME = {
    "ConfigManager": "config", "GenerationConfig": "config",
    "Chunk": "engine", "GenerationResult": "engine", "Stream": "engine", "ToolCall": "engine",
    "CheckpointError": "errors", "ConfigurationError": "errors", "ContextLengthError": "errors",
    "GenerationError": "errors", "LoadstoneError": "errors", "ModelLoadError": "errors",
    "ModelNotLoadedError": "errors", "QueueFullError": "errors", "ResourceError": "errors",
    "SourceError": "errors", "TransientSourceError": "errors",
    "handle_exceptions": "errors",
    "Forecast": "forecast", "plan": "forecast",
    "Device": "hardware", "DeviceManager": "hardware", "get_device_manager": "hardware",
    "MemoryReport": "life", "Receipt": "life",
    "ModelManager": "manager", "get_model_manager": "manager", "load_qwen_model": "manager",
    "retry_on_exception": "retry",
    "Event": "telemetry", "subscribe": "telemetry",
}  # fmt: skip

__all__ = [
    "CheckpointError",
    "Chunk",
    "ConfigManager",
    "ConfigurationError",
    "ContextLengthError",
    "Device",
    "DeviceManager",
    "Event",
    "Forecast",
    "GenerationConfig",
    "GenerationError",
    "GenerationResult",
    "LoadstoneError",
    "MemoryReport",
    "ModelLoadError",
    "ModelManager",
    "ModelNotLoadedError",
    "QueueFullError",
    "Receipt",
    "ResourceError",
    "SourceError",
    "Stream",
    "ToolCall",
    "TransientSourceError",
    "get_device_manager",
    "get_model_manager",
    "handle_exceptions",
    "load_qwen_model",
    "plan",
    "retry_on_exception",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loadstone' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
