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

    from .linear import Int8Linear

    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    numbers = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scales = torch.empty(rows, device=device)
    step = max(1, CHUNK // columns)
    at = 0
    for weight in weights:
        for start in range(0, len(weight), step):
            part = weight[start : start + step].to(device).float()
            most = part.abs().amax(-1)
            factor = torch.where(most > 0, 127.0 / most, torch.zeros_like(most))
            numbers[at : at + len(part)] = part.mul(factor.unsqueeze(-1)).round_()
            scales[at : at + len(part)] = most / 127.0
            at += len(part)
    return Int8Linear(numbers, scales, dtype)
