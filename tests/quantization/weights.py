"""Random weights, and what bitsandbytes makes of them."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import torch

from loadstone.quantization import find_strategy
from loadstone.quantization.linear import Linear

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return weights with rows of different sizes, as those of models are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=generator).mul_(0.1).add_(0.01)
    return torch.randn(rows, columns, generator=generator).mul_(sizes).to(dtype)


def quantized(
    strategy: str, *weights: torch.Tensor, part: str = "linear", dtype: torch.dtype = torch.float32
) -> Linear:
    """Return the weights as `strategy` keeps them on the CPU."""
    return find_strategy(strategy).quantize(part, weights, CPU, dtype)


def whole(linear: Linear) -> torch.Tensor:
    """Return all of W as float32."""
    return linear.dequantize(0, linear.rows, torch.float32)


def bitsandbytes_nf4(weight: torch.Tensor, *, doubly: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bitsandbytes' codes (flat) and its dequantised weights (float32)."""
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, compress_statistics=doubly, quant_type="nf4")
    state.dtype = torch.float32  # compare codes, not the rounding of what comes back
    return codes.flatten(), bitsandbytes.dequantize_4bit(codes, state).float()


def same(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the share of bytes that are the same."""
    return float((found.flatten() == wanted.flatten()).float().mean())


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the root of the mean squared error."""
    return float((found - weight.float()).pow(2).mean().sqrt())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the length of the difference relative to what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
