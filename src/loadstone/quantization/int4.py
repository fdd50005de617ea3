"""Strategy `int4`: 4-bit integers, a scale and a zero point for each 64, in the layers; embedding and head in 8 bits.

Integers are what other libraries' 4-bit products take, aten's among them: on an Apple GPU and on processors where our
kernels cannot be had this multiplies several times as fast as NF4, for a little less precision in a little more memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Facts, Packing
from .codes import BLOCK
from .four_bits import FourBits

if TYPE_CHECKING:
    import torch

    from .linear import Linear


class Int4(FourBits):
    """Keeps the layers' matrices as 4-bit integers, and what maps tokens in and out as `FourBits` says."""

    name = "int4"
    summary = "integers, 4.5 bits a weight in the layers; embedding and head in 8 bits"
    beside = 4

    def packing_in_four(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Packing:
        return _Quantizing(rows, columns, device, dtype)

    def layout_in_four(self, device_kind: str) -> str:
        from .int4_linear import int4_layout

        return f"int4-{BLOCK}-{int4_layout(device_kind)}-1"

    def restore_in_four(self, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        from .int4_linear import restore_int4

        return restore_int4(tensors, facts, dtype)


class _Quantizing(Packing):
    """Quantises rows as they come."""

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        from .int4_linear import Int4Packing
        from .kernels.cpu import cpu_kernels

        self._packing = Int4Packing(rows, columns, BLOCK, device, dtype)
        self._kernels = cpu_kernels()

    def add(self, first: int, rows: torch.Tensor) -> None:
        from .reference import STRIP_NUMBERS, quantize_int4

        quantize = quantize_int4 if self._kernels is None else self._kernels.quantize_int4
        step = max(1, STRIP_NUMBERS // rows.shape[1])  # so that what lies between stays in the core's cache
        for start in range(0, len(rows), step):
            self._packing.add(first + start, *quantize(rows[start : start + step]))

    def finish(self) -> Linear:
        return self._packing.finish()
