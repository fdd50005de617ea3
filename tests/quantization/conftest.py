"""Each test that asks for `kernels` runs twice: with our CPU kernels, and as on a machine that cannot have them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loadstone.quantization import linear
from loadstone.quantization.kernels import cpu


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Weights this small gain nothing from more; tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_found", [None])
    monkeypatch.setattr(linear, "kernels_for", lambda device, columns: None)


@pytest.fixture(params=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        request.getfixturevalue("no_kernels")
    elif cpu.why_not() is not None:
        pytest.skip(f"no kernels here: {cpu.why_not()}")
    return str(request.param)
