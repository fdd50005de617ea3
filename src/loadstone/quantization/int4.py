"""Strategy `int4`: 4-bit integers, a scale and a zero point for each 64, in the layers; embedding and head in 8 bits.

Integers are what other libraries' 4-bit products take, aten's among them: on an Apple GPU and on processors where our
kernels cannot be had this multiplies several times as fast as NF4, for a little less precision in a little more memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loadstone.errors import ModelLoadError

from .base import Facts, Packing
from .codes import BLOCK, padded
from .four_bits import FourBits

if TYPE_CHECKING:
    import torch

    from loadstone.checkpoint.coding import Coding
    from loadstone.checkpoint.quantized.coded import Coded

    from .linear import Linear


LARGEST_GROUP = 256


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

    def keeps(self, coding: Coding) -> bool:
        return coding.kind == "grouped" and coding.bits == 4

    def coded_bytes(self, coding: Coding, rows: int, columns: int) -> int:
        if columns % BLOCK:
            return self.weight_bytes("linear", rows, columns)  # in 8 bits, as all that has no whole blocks
        # aten has no larger groups than 256; where our kernels multiply these are a little less.
        group = min(coding.group or columns, LARGEST_GROUP)
        order = 4 * columns if coding.is_reordered else 0
        return padded(rows) * (columns // 2 + 4 * (columns // group)) + order

    def coded_packing(
        self, coding: Coding, rows: int, columns: int, *, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        if columns % BLOCK:
            return super().coded_packing(coding, rows, columns, device=device, dtype=dtype)
        return _Keeping(rows, columns, coding, device, dtype)

    def coded_layout(self, coding: Coding, device_kind: str) -> str:
        from .int4_linear import int4_layout

        return f"int4-{coding.group}-{int4_layout(device_kind, coding.group or BLOCK)}-1"

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


class _Keeping(Packing):
    """Takes the codes of others as they come; where their columns were sorted, all rows must be in the same order."""

    def __init__(self, rows: int, columns: int, coding: Coding, device: torch.device, dtype: torch.dtype) -> None:
        from .int4_linear import Int4Packing

        self._packing = Int4Packing(rows, columns, coding.group or columns, device, dtype)
        self._device = device
        self._groups: torch.Tensor | None = None
        self._order: torch.Tensor | None = None
        self._lock = threading.Lock()

    def add(self, first: int, rows: torch.Tensor) -> None:
        raise TypeError("a matrix that is kept in the codes of others takes no numbers")

    def add_coded(self, first: int, rows: Coded) -> None:
        from loadstone.checkpoint.quantized.coded import GroupedRows

        if not isinstance(rows, GroupedRows):
            raise TypeError(f"{type(rows).__name__} are not codes in groups")
        order = self._sorted(rows.groups)
        codes = rows.codes if order is None else rows.codes[:, order]
        self._packing.add(first, codes[:, 0::2] << 4 | codes[:, 1::2], rows.scales, rows.zeros)

    def _sorted(self, groups: torch.Tensor | None) -> torch.Tensor | None:
        """Return the columns in the order of their groups, given the group of each; None where that is their own."""
        import torch

        if groups is None:
            groups = torch.arange(self._packing.columns) // self._packing.group
        with self._lock:
            if self._groups is None:
                self._groups, order = groups, groups.argsort(stable=True)
                is_own = torch.equal(order, torch.arange(len(order)))
                self._order = None if is_own else order
            elif groups is not self._groups and not torch.equal(groups, self._groups):
                raise ModelLoadError(
                    "matrices that are multiplied together have their columns in different orders, which is not kept",
                    hint="Ask for `quantization: 8bit`: rows of 8 bits have no order.",
                )
        return self._order

    def finish(self) -> Linear:
        from .int4_linear import ReorderedLinear

        made = self._packing.finish()
        return made if self._order is None else ReorderedLinear(made, self._order.to(self._device))
