"""Models that tests of several rooms share, each made or loaded once."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# What tests keep on disk is theirs, in every process that they start, and goes with them; workers of a run share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _home = tempfile.TemporaryDirectory(prefix="loadstone-tests-")
    os.environ["LOADSTONE_HOME"] = _home.name
KERNELS = Path(os.environ["LOADSTONE_HOME"], "cache", "kernels")

if TYPE_CHECKING:
    from loadstone import Event, ModelManager


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Leave what is there out of later collections: loads and unloads collect, and libraries have many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def new_home() -> Callable[[Path], Path]:
    """Makes a home that is empty but for the compiled kernels, which all processes of the tests share."""

    def make(home: Path) -> Path:
        KERNELS.mkdir(parents=True, exist_ok=True)
        (home / "cache").mkdir(parents=True)
        (home / "cache" / "kernels").symlink_to(KERNELS, target_is_directory=True)
        return home

    return make


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
