"""Each test that asks for `kernels` runs three times: with our CPU kernels as this machine has them, with those for
256-bit vectors, and as on a machine that cannot have any."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

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


@cache
def narrow_kernels() -> cpu.CpuKernels:
    return cpu.CpuKernels(is_wide=False)


@pytest.fixture(params=["kernels", "narrow", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        request.getfixturevalue("no_kernels")
    elif cpu.why_not() is not None:
        pytest.skip(f"no kernels here: {cpu.why_not()}")
    elif request.param == "narrow":
        monkeypatch.setattr(cpu, "_found", [narrow_kernels()])
    return str(request.param)
