"""Strategy `4bit`: NF4 with blocks of 64 (QLoRA, Dettmers et al. 2023) for the layers, 8 bits for embedding and head.

On CUDA the weights are bitsandbytes' own, absmax doubly quantised, multiplied by its kernels. On the CPU the codes
are the same and the absmax has 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Strategy
from .codes import BLOCK

if TYPE_CHECKING:
    import torch

    from .linear import Linear


LARGEST = 2.0**15  # what the largest absmax is kept as: near float16's own largest, so that small ones keep theirs


class Nf4(Strategy):
    """Keeps the layers' matrices in 4 bits and what maps tokens in and out in 8."""

    name = "4bit"
    summary = "NF4, 4.25 bits a weight in the layers; embedding and head in 8 bits"

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        if part != "linear" or columns % BLOCK:
            return rows * columns + 4 * rows
        return rows * columns // 2 + 2 * (rows * columns // BLOCK)

    def quantize(self, part: str, weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Linear:
        if part != "linear" or weights[0].shape[1] % BLOCK:
            from .int8 import quantize_int8

            return quantize_int8(weights, device, dtype)
        if device.type == "cuda":
            from ._bitsandbytes import BitsandbytesNf4

            return BitsandbytesNf4.quantize(weights, device, dtype)
        return _quantize_nf4(weights, device)


def _quantize_nf4(weights: Sequence[torch.Tensor], device: torch.device) -> Linear:
    import torch

    from .kernels.cpu import cpu_kernels
    from .linear import Nf4Linear
    from .reference import quantize_nf4

    kernels = cpu_kernels()
    rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    absmax = torch.empty(rows, columns // BLOCK)
    at = 0
    for weight in weights:
        part = slice(at, at + len(weight))
        if kernels is not None:
            kernels.quantize_nf4(weight.contiguous(), codes[part], absmax[part])
        else:
            codes[part], absmax[part] = quantize_nf4(weight)
        at += len(weight)
    # One NaN or infinity spoils its own block only, and one huge weight leaves the others' absmax its eleven bits.
    scale = float(absmax.where(absmax.isfinite(), 0).max()) / LARGEST or 1.0
    return Nf4Linear(codes.to(device), absmax.div_(scale).half().to(device), scale)
