"""Strategy `none`: weights stay the floats that the checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Facts, Packed, Packing

if TYPE_CHECKING:
    import torch

    from .linear import Linear


class NoQuantization(Packed):
    """Keeps every weight as it is; on an accelerator, in the compute dtype.

    It has no layout: a copy on disk would be as large as the checkpoint, and no quicker to read.
    """

    name = "none"
    summary = "as in the checkpoint, 16 or 32 bits a weight"

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        return rows * columns * dtype_bytes

    def packing(
        self, part: str, rows: int, columns: int, *, source: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        import torch

        kept = source if device.type == "cpu" else dtype
        return _Stacking(torch.empty(rows, columns, dtype=kept, device=device), dtype)

    def restore(self, part: str, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        """Return a weight that another strategy left alone, and kept beside its own."""
        from .linear import DenseLinear

        return DenseLinear(tensors["weight"], dtype)


class _Stacking(Packing):
    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def add(self, first: int, rows: torch.Tensor) -> None:
        self.weight[first : first + len(rows)] = rows

    def finish(self) -> Linear:
        from .linear import DenseLinear

        return DenseLinear(self.weight, self.dtype)
