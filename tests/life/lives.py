"""What the tests of this room share: a configuration, and how long they wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadstone import Event

PATIENCE = 60  # seconds, after which a test fails instead of waiting on

Wait = Callable[..., Event]


def config_of(folder: Path, *, engine: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Return a configuration with a store of its own, whose answers are always the same."""
    return {
        "model_config": {"base_model": str(folder), **settings},
        "generation": {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 8},
        "engine": engine or {},
        "store": {"folder": str(folder.parent / "store")},
    }
