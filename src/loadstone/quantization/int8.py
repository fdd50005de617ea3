"""Strategy `8bit`: one scale for each output row, as LLM.int8() keeps its weights (Dettmers et al. 2022).

On CUDA bitsandbytes multiplies 8-bit activations with them. Our CPU product scales activations to 15 bits in blocks
of 64, so it needs no separate path for outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Facts, Packed, Packing
from .codes import BLOCK, padded
from .turning import wide_kernels

if TYPE_CHECKING:
    import torch

    from loadstone.checkpoint.coding import Coding
    from loadstone.checkpoint.quantized.coded import Coded

    from .kernels.cpu import CpuKernels
    from .linear import Linear

CHUNK = 1 << 20  # weights widened to float32 at a time


class Int8(Packed):
    """Keeps every matrix, the embedding too, in 8 bits a weight."""

    name = "8bit"
    summary = "8 bits a weight, one scale for each row"

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        # Rows that stand in sixteens may have a few too many; an embedding's stand alone, as they are looked up.
        return (rows if part == "embedding" or columns % BLOCK else padded(rows)) * columns + 4 * rows

    def packing(
        self, part: str, rows: int, columns: int, *, source: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        return int8_packing(part, rows, columns, device, dtype)

    def keeps(self, coding: Coding) -> bool:
        return coding.kind == "int8"

    def layout(self, device_kind: str) -> str:
        return int8_layout(device_kind)

    def restore(self, part: str, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        return restore_int8(tensors, dtype)


def int8_packing(part: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Packing:
    """Return what makes a weight of 8 bits; an embedding that is not multiplied stays as its rows are looked up."""
    is_turned = device.type == "cpu" and columns % BLOCK == 0 and part != "embedding"
    if is_turned and (kernels := wide_kernels()) is not None:
        return _TurnedPacking(rows, columns, kernels, dtype)
    return Int8Packing(rows, columns, device, dtype)


def int8_layout(device_kind: str) -> str:
    """Return the name of the bytes that `int8_packing` makes."""
    return "int8-rows-turned-1" if device_kind == "cpu" and wide_kernels() is not None else "int8-rows-1"


class Int8Packing(Packing):
    """Each row scaled to [-127, 127] and rounded."""

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        from .linear import kernels_for

        self.numbers = torch.empty(rows, columns, dtype=torch.int8, device=device)
        self.scales = torch.empty(rows, device=device)
        self.dtype = dtype
        self.kernels = kernels_for(device, columns)

    def add(self, first: int, rows: torch.Tensor) -> None:
        part = slice(first, first + len(rows))
        if self.kernels is not None:
            self.kernels.quantize_int8(rows, self.numbers[part], self.scales[part])
        else:
            _round(rows, self.numbers[part], self.scales[part])

    def add_coded(self, first: int, rows: Coded) -> None:
        from loadstone.checkpoint.quantized.coded import Int8Rows

        if not isinstance(rows, Int8Rows):
            super().add_coded(first, rows)
            return
        part = slice(first, first + len(rows.values))
        self.numbers[part], self.scales[part] = rows.values, rows.scales

    def finish(self) -> Linear:
        return restore_int8({"weight": self.numbers, "scales": self.scales}, self.dtype)


class _TurnedPacking(Packing):
    """The same, turned for the wide products."""

    def __init__(self, rows: int, columns: int, kernels: CpuKernels, dtype: torch.dtype) -> None:
        import torch

        from .turned import turned_space

        self.turned = turned_space(rows, columns, torch.int8)
        self.scales = torch.empty(rows)
        self.dtype, self.kernels = dtype, kernels

    def add(self, first: int, rows: torch.Tensor) -> None:
        from .turned import turn_in_strips

        def quantize(part: torch.Tensor, numbers: torch.Tensor, where: slice) -> None:
            self.kernels.quantize_int8(part, numbers, self.scales[where])

        turn_in_strips(self.kernels, rows, self.turned, first, quantize)

    def add_coded(self, first: int, rows: Coded) -> None:
        from loadstone.checkpoint.quantized.coded import Int8Rows

        if not isinstance(rows, Int8Rows):
            super().add_coded(first, rows)
            return
        self.scales[first : first + len(rows.values)] = rows.scales
        self.kernels.turn(rows.values.contiguous(), self.turned, first)

    def finish(self) -> Linear:
        return restore_int8({"turned": self.turned, "scales": self.scales}, self.dtype)


def restore_int8(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Linear:
    """Return the product of a weight kept in 8 bits."""
    from .linear import Int8Linear, TurnedInt8Linear

    if "turned" in tensors:
        return TurnedInt8Linear(tensors["turned"], tensors["scales"], dtype)
    return Int8Linear(tensors["weight"], tensors["scales"], dtype)


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
