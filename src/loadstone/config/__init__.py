"""What the user asked for: frozen wishes, and the layers that they are read from."""

from .generation import (
    CONSTRAINTS,
    GenerationConfig,
    Sampling,
    generation_from_checkpoint,
    resolve_generation,
    tell_generation,
)
from .manager import ConfigManager
from .schema import EngineConfig, LoadConfig, LoadstoneConfig, RetryConfig, StoreConfig

__all__ = [
    "CONSTRAINTS",
    "ConfigManager",
    "EngineConfig",
    "GenerationConfig",
    "LoadConfig",
    "LoadstoneConfig",
    "RetryConfig",
    "Sampling",
    "StoreConfig",
    "generation_from_checkpoint",
    "resolve_generation",
    "tell_generation",
]
