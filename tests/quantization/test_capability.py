"""With `ATEN_CPU_CAPABILITY=avx2`, which torch heeds, we do without AVX512 too: in our kernels and in aten's product.

A process of its own, since both decide once. What it says is what a processor without AVX512 does.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the cap is of x86, and torch's kernels of Linux"
)

SCRIPT = """
import json
import torch
from loadstone.quantization import find_strategy
from loadstone.quantization.kernels import cpu

def looked_at():
    found = {}
    weight, x = torch.randn(150, 640) * 0.05, torch.randn(15, 640)
    for name in ("8bit", "4bit", "int4"):
        made = find_strategy(name).quantize("linear", [weight], torch.device("cpu"), torch.float32)
        whole = made.dequantize(0, 150, torch.float32)
        errors = []
        for count in (1, 4, 15):
            wanted = x[:count] @ whole.T
            errors.append(float((made(x[:count]) - wanted).norm() / wanted.norm()))
        found[name] = {
            "form": type(made).__name__, "error": max(errors), "layout": find_strategy(name).layout("cpu"),
            "of_weight": float((whole - weight).norm() / weight.norm()),
        }
    return found

kernels = cpu.cpu_kernels()
from loadstone.quantization.kernels._llvm import usable_features
said = {
    "capability": torch.backends.cpu.get_cpu_capability(), "has_kernels": kernels is not None,
    "is_wide": kernels is not None and kernels.is_wide,
    "wide_features": [name for name, is_there in usable_features().items() if "512" in name and is_there],
    "with_kernels": looked_at(),
}
cpu._found[:] = [None]
said["with_aten"] = looked_at()
print(json.dumps(said))
"""
PRODUCTS = ("8bit", "4bit", "int4")


def capped(capability: str) -> dict[str, Any]:
    """Return what the script says under a cap."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture(scope="module")
def with_avx2() -> dict[str, Any]:
    said = capped("avx2")
    if said["capability"] != "AVX2":
        pytest.skip("this processor has no AVX2")
    return said


def test_our_kernels_use_no_avx512(with_avx2: dict[str, Any]) -> None:
    assert with_avx2["has_kernels"]
    assert not with_avx2["is_wide"]
    assert with_avx2["wide_features"] == []


@pytest.mark.parametrize("strategy", PRODUCTS)
def test_our_products_are_right_there(with_avx2: dict[str, Any], strategy: str) -> None:
    said = with_avx2["with_kernels"][strategy]
    assert said["error"] < 2e-4
    assert said["of_weight"] < 0.12
    assert "turned" not in said["layout"]


def test_atens_product_is_right_there(with_avx2: dict[str, Any]) -> None:
    said = with_avx2["with_aten"]["int4"]
    assert said["form"] == "AtenInt4Linear"
    assert said["error"] < 6e-3
    assert said["of_weight"] < 0.12


def test_what_aten_packs_has_a_name_for_each_capability(with_avx2: dict[str, Any]) -> None:
    """Or the store would hand the rows of one processor to another."""
    assert "aten-avx2" in with_avx2["with_aten"]["int4"]["layout"]


def test_without_vectors_weights_are_dequantised() -> None:
    said = capped("default")
    assert not said["has_kernels"]
    for strategy in PRODUCTS:
        assert said["with_aten"][strategy]["error"] < 1e-5
    assert said["with_aten"]["int4"]["form"] == "Int4Linear"
