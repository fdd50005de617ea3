"""Models that tests of several rooms share, each made or loaded once."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# What tests keep on disk is theirs, in every process that they start, and goes with them.
_home = tempfile.TemporaryDirectory(prefix="loadstone-tests-")
os.environ["LOADSTONE_HOME"] = _home.name

if TYPE_CHECKING:
    from loadstone import Event, ModelManager


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Leave what is there out of later collections: loads and unloads collect, and libraries have many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2() -> Iterator[ModelManager]:
    """The bundled model, loaded in 4 bits; leave it loaded."""
    from loadstone import ModelManager

    with ModelManager({"model_config": {"base_model": "smollm2", "quantization": "4bit"}}) as manager:
        manager.load()
        yield manager


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """The folder of a small random model, which the test may spoil."""
    from small_model import GENERATION, write_small_model

    return write_small_model(tmp_path / "small-model", **GENERATION)


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """Every event of the test, in order."""
    from loadstone import subscribe

    seen: list[Event] = []
    unsubscribe = subscribe(seen.append)
    yield seen
    unsubscribe()
