"""Small models as transformers sees them: random ones of every architecture, and one that a manager has loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import tiny
import torch
from pairs import VARIANTS
from views import Seen, see

from loadstone import ModelManager
from small_model import write_small_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """Return a variant of the parity tests, kept in some way, as transformers sees it; each is made once."""

    @cache
    def folder_of(variant: str) -> Path:
        model_type, changes = VARIANTS[variant]
        return tiny.write(tmp_path_factory.mktemp(variant), model_type, **changes)

    @cache
    def make(variant: str, strategy: str = "none") -> Seen:
        return see(folder_of(variant), strategy)

    return make


GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelManager]:
    """A manager of the small model in 4 bits; leave it loaded."""
    place = tmp_path_factory.mktemp("bridge")
    config = {
        "model_config": {"base_model": str(write_small_model(place / "model")), "quantization": "4bit", "context": 512},
        "generation": GREEDY,
        "store": {"folder": str(place / "store")},
    }
    with ModelManager(config) as made:
        made.load()
        yield made


@pytest.fixture
def one_life(tmp_path: Path) -> Iterator[ModelManager]:
    """A manager of the small model, not loaded yet, whose model the test may unload."""
    config = {
        "model_config": {"base_model": str(write_small_model(tmp_path / "model")), "context": 512},
        "generation": GREEDY,
        "store": {"folder": str(tmp_path / "store")},
    }
    with ModelManager(config) as made:
        yield made
