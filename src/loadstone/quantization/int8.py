"""Strategy `8bit`: one scale for each output row, as LLM.int8() keeps its weights (Dettmers et al. 2022).

On CUDA bitsandbytes multiplies 8-bit activations with them. Our CPU product scales activations to 15 bits in blocks
of 64, so it needs no separate path for outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Strategy

if TYPE_CHECKING:
    import torch

    from .linear import Int8Linear, Linear

CHUNK = 1 << 20  # weights widened to float32 at a time


class Int8(Strategy):
    """Keeps every matrix, the embedding too, in 8 bits a weight."""

    name = "8bit"
    summary = "8 bits a weight, one scale for each row"

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        return rows * columns + 4 * rows

    def quantize(self, part: str, weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Linear:
        return quantize_int8(weights, device, dtype)


def quantize_int8(weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Int8Linear:
    """Return the stacked weights with each row scaled to [-127, 127] and rounded."""
    import torch

    from .linear import Int8Linear, kernels_for

    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    numbers = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scales = torch.empty(rows, device=device)
    kernels = kernels_for(device, columns)
    at = 0
    for weight in weights:
        part = slice(at, at + len(weight))
        if kernels is not None and weight.is_cpu:
            kernels.quantize_int8(weight.contiguous(), numbers[part], scales[part])
        else:
            _round(weight, numbers[part], scales[part])
        at += len(weight)
    return Int8Linear(numbers, scales, dtype)


def _round(weight: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> None:
    """Write a weight as 8-bit numbers, and each row's scale, a few rows at a time."""
    import torch

    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].to(numbers.device).float()
        most = part.abs().amax(-1)
        # A whole tensor over another is divided; a number over a tensor is multiplied by a rounded reciprocal.
        factor = torch.where(most > 0, torch.full_like(most, 127.0) / most, torch.zeros_like(most))
        numbers[rows] = part.mul(factor.unsqueeze(-1)).round_()
        scales[rows] = most / torch.full_like(most, 127.0)
