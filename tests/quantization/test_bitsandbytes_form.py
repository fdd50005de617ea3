"""The form that CUDA uses, on the CPU, where bitsandbytes has plain implementations of the same operations."""

from __future__ import annotations

import pytest
import torch
import weights

from loadstone.quantization import _bitsandbytes, find_strategy
from loadstone.quantization._bitsandbytes import BitsandbytesNf4
from loadstone.quantization.linear import Nf4Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(*parts: torch.Tensor, dtype: torch.dtype = torch.float32) -> BitsandbytesNf4:
    return BitsandbytesNf4.quantize(torch.cat([part.to(dtype) for part in parts]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_products_are_those_of_the_dequantised_weight(dtype: torch.dtype, count: int) -> None:
    linear = quantized(weights.random(96, 256), dtype=dtype)
    x = torch.randn(count, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = linear(x)
    assert found.dtype == dtype
    assert weights.relative(found.float(), x.float() @ weights.whole(linear).T) < {4: 2e-4, 2: 1e-2}[dtype.itemsize]


def test_a_square_weight_is_not_taken_for_its_transpose() -> None:
    weight = weights.random(128, 128)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    assert weights.relative(quantized(weight)(x), x @ weight.T) < 0.2


def test_a_tall_weight_is_not_taken_for_its_transpose() -> None:
    weight = weights.random(512, 128)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    assert weights.relative(quantized(weight)(x), x @ weight.T) < 0.2


def test_codes_are_those_of_the_cpu_form() -> None:
    weight = weights.random(128, 512)
    ours = weights.quantized("4bit", weight)
    assert isinstance(ours, Nf4Linear)
    assert weights.same(quantized(weight).codes, ours.codes) >= 0.995


def test_stacked_weights_are_those_of_each() -> None:
    parts = [weights.random(rows, 128, seed=rows) for rows in (33, 16)]
    stacked = quantized(*parts)
    assert (stacked.rows, stacked.columns) == (49, 128)
    assert torch.equal(stacked.codes.flatten(), torch.cat([quantized(part).codes.flatten() for part in parts]))


def test_some_rows_are_dequantised_as_in_the_whole() -> None:
    linear = quantized(weights.random(40, 128))
    assert torch.equal(linear.dequantize(7, 19, torch.float32), weights.whole(linear)[7:19])


def test_double_quantisation_keeps_absmax_in_a_byte() -> None:
    linear = quantized(weights.random(256, 1024))
    kept = linear.tensors()
    assert kept["absmax"].dtype == torch.uint8
    assert kept["absmax"].numel() == 256 * 1024 // 64
    assert linear.nbytes == sum(tensor.nbytes for tensor in kept.values())
    assert linear.nbytes / (256 * 1024) == pytest.approx(0.516, abs=0.006)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_8_bit_product_of_cuda_is_close_to_the_weights(dtype: torch.dtype) -> None:
    """Activations are rounded to 8 bits a row there: a hundredth of error is what that costs."""
    linear = find_strategy("8bit").quantize("linear", [weights.random(64, 256)], weights.CPU, dtype)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = _bitsandbytes.int8_product(x, linear.weight, linear.scales)
    assert found.dtype == dtype
    assert weights.relative(found.float(), x.float() @ weights.whole(linear).T) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_its_tensors_and_facts_make_is_the_same_weight(dtype: torch.dtype) -> None:
    """As the store keeps it and gives it back."""
    made = quantized(weights.random(96, 256), dtype=dtype)
    restored = find_strategy("4bit").restore("linear", made.tensors(), made.facts, dtype)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert isinstance(restored, BitsandbytesNf4)
    assert torch.equal(restored(x), made(x))
