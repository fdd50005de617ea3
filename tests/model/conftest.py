"""Random checkpoints and what transformers makes of them, each made once for all tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from pairs import VARIANTS, Pair


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and would wait for whatever else this machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(variant: str) -> Pair:
        model_type, changes = VARIANTS[variant]
        folder = tiny.write(tmp_path_factory.mktemp(variant), model_type, **changes)
        return Pair(folder, tiny.load(folder)[0], tiny.reference(folder))

    return make


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("checkpoint"), "llama")
