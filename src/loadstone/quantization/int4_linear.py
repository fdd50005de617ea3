"""The forms of a weight of asymmetric 4-bit integers: W ≈ scale · (code - zero point), with both for each group.

Codes, scales and zero points are kept as they come, whoever made them: `Int4Packing` takes those of AWQ, GPTQ (whose
zero points are one more than its files have, so 16 at most) or compressed-tensors as well as our own. Where our kernels
multiply they stay as they are, or turned; elsewhere aten's own product has them its own way (`aten_int4.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .aten_int4 import AtenInt4Linear, aten_multiplies, aten_packing_name
from .base import Facts
from .codes import BLOCK, LANES
from .kernels.cpu import CpuKernels
from .linear import KernelLinear, Linear, kernels_for
from .turned import plain_rows, plain_rows_at, turned_space, whole_groups

LARGEST = 2.0**15  # no scale is kept as more: near float16's own largest, so that small ones keep their bits


class Int4Linear(KernelLinear):
    """W as codes of 4 bits (rows × columns/2, the first of two in the high nibble), and what is beside each group.

    That are two float16, rows × groups × 2: its scale, to be multiplied with `scale`, and its zero point. `scale` is a
    power of two, so no scale that comes as a float16 is rounded, and of bfloat16 only one below 2⁻³² of the largest.
    """

    kind = "int4"

    def __init__(self, codes: torch.Tensor, beside: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__(codes.shape[0], codes.shape[1] * 2)
        self.codes, self.beside = codes, beside
        self._set(beside.shape[1], scale, dtype, codes.device)
        if self.kernels is not None and self.kernels.is_wide:  # which want it turned
            self.kernels = None

    def _set(self, groups: int, scale: float, dtype: torch.dtype, device: torch.device) -> None:
        self.group, self.scale, self.dtype = self.columns // groups, scale, dtype
        self.kernels = int4_kernels(device, self.columns, self.group)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.codes, self.beside

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"codes": self.codes, "beside": self.beside}

    @property
    def facts(self) -> Facts:
        return {"scale": self.scale}

    def _part(self, start: int, stop: int) -> Linear | None:
        return Int4Linear(self.codes[start:stop], self.beside[start:stop], self.scale, self.dtype)

    @property
    def scales(self) -> torch.Tensor:
        """The scale of each group, rows × groups, float32."""
        return self.rows_of(0, self.rows)[1][..., 0].float() * self.scale

    @property
    def zeros(self) -> torch.Tensor:
        """The zero point of each group, rows × groups, float32."""
        return self.rows_of(0, self.rows)[1][..., 1].float()

    def rows_of(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes of rows [start, stop), and what is beside their groups."""
        return self.codes[start:stop], self.beside[start:stop]

    def rows_at(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes of the rows that `ids` name, and what is beside their groups."""
        return self.codes[ids], self.beside[ids]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_int4(*self.rows_of(start, stop), self.scale).to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize_int4(*self.rows_at(ids), self.scale).to(self.dtype)


class TurnedInt4Linear(Int4Linear):
    """The same, turned for the wide products (`turned.py`): … × words × 16 × 4, and beside … × groups × 16 × 2."""

    def __init__(
        self, turned: torch.Tensor, turned_beside: torch.Tensor, scale: float, rows: int, dtype: torch.dtype
    ) -> None:
        KernelLinear.__init__(self, rows, turned.shape[1] * 8)
        self.turned, self.turned_beside = turned, turned_beside
        self._set(turned_beside.shape[1], scale, dtype, turned.device)

    @property
    def codes(self) -> torch.Tensor:  # type: ignore[override]
        """The codes of each row, one after the other, in new memory."""
        return self.rows_of(0, self.rows)[0]

    @property
    def beside(self) -> torch.Tensor:  # type: ignore[override]
        """What is beside each group, rows × groups × 2, in new memory."""
        return self.rows_of(0, self.rows)[1]

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.turned, self.turned_beside

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"turned": self.turned, "turned_beside": self.turned_beside}

    @property
    def facts(self) -> Facts:
        return {"scale": self.scale, "rows": float(self.rows)}

    def _part(self, start: int, stop: int) -> Linear | None:
        groups = whole_groups(start, stop)
        if groups is None:
            return None
        turned, beside = self.turned[groups], self.turned_beside[groups]
        return TurnedInt4Linear(turned, beside, self.scale, stop - start, self.dtype)

    def rows_of(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        beside = plain_rows(self.turned_beside, start, stop)
        return plain_rows(self.turned, start, stop), beside.view(len(beside), -1, 2)

    def rows_at(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_rows_at(self.turned, ids), plain_rows_at(self.turned_beside, ids).view(len(ids), -1, 2)


class ReorderedLinear(Linear):
    """A weight whose columns were sorted before their groups were made, as GPTQ's with act-order.

    Column i of `sorted` multiplies number `order[i]` of a row of x.
    """

    def __init__(self, within: Linear, order: torch.Tensor) -> None:
        super().__init__(within.rows, within.columns)
        self.within = within
        self.order = order.to(torch.int32)
        self._places = torch.empty_like(self.order)
        self._places[self.order.long()] = torch.arange(len(order), dtype=torch.int32, device=order.device)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.within(x.index_select(1, self.order))

    def _part(self, start: int, stop: int) -> Linear:
        return ReorderedLinear(self.within.part(start, stop), self.order)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {**self.within.tensors(), "order": self.order}

    @property
    def facts(self) -> Facts:
        return self.within.facts

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.within.dequantize(start, stop, dtype).index_select(1, self._places)


class Int4Packing:
    """One weight of 4-bit integers on its way into the form that multiplies fastest on its device.

    `add` takes rows in any order, from several threads; `group` is the number of columns of a scale and a zero point,
    and a divisor of the columns, which are an even number.
    """

    def __init__(self, rows: int, columns: int, group: int, device: torch.device, dtype: torch.dtype) -> None:
        if columns % 2 or columns % group:
            raise ValueError(f"{columns} columns are no whole number of pairs and of groups of {group}")
        self.rows, self.columns, self.group, self.device, self.dtype = rows, columns, group, device, dtype
        kernels = int4_kernels(device, columns, group)
        self._kernels: CpuKernels | None = kernels if kernels is not None and kernels.is_wide else None
        if self._kernels is not None:
            self._codes = turned_space(rows, columns // 2, torch.uint8)
        else:
            self._codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        self._scales = torch.empty(rows, columns // group)
        self._zeros = torch.empty(rows, columns // group, dtype=torch.float16)

    def add(self, first: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Take rows from `first` on: codes (M × columns/2, uint8, the first of two in the high nibble, on the CPU),
        scales (M × groups, any float type) and zero points (M × groups, from 0 to 16 in sixteenths)."""
        part = slice(first, first + len(codes))
        self._scales[part] = scales
        self._zeros[part] = zeros
        if self._kernels is not None:
            self._kernels.turn(codes.contiguous(), self._codes, first)
        else:
            self._codes[part] = codes

    def finish(self) -> Linear:
        """Return the product, once all rows are here."""
        has_kernels = int4_kernels(self.device, self.columns, self.group) is not None
        if not has_kernels and aten_multiplies(self.device, self.columns, self.group):
            return AtenInt4Linear.of(self._codes, self._scales, self._zeros, self.device, self.dtype)
        scales, scale = narrowed_exactly(self._scales)
        beside = torch.stack((scales, self._zeros), -1)
        if self._kernels is not None:
            return TurnedInt4Linear(self._codes, _turned_beside(beside), scale, self.rows, self.dtype)
        return Int4Linear(self._codes.to(self.device), beside.to(self.device), scale, self.dtype)


def int4_layout(device_kind: str, group: int = BLOCK) -> str:
    """Return a name for the form that whole blocks of 64 columns take on a kind of device, in groups of so many."""
    device, columns = torch.device(device_kind), BLOCK * group
    kernels = int4_kernels(device, columns, group)
    if kernels is not None:
        return "turned" if kernels.is_wide else "plain"
    return f"aten-{aten_packing_name(device)}" if aten_multiplies(device, columns, group) else "plain"


def restore_int4(tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
    """Return the product of a weight of 4-bit integers whose `tensors()` and `facts` these are."""
    if "order" in tensors:
        within = {name: tensor for name, tensor in tensors.items() if name != "order"}
        return ReorderedLinear(restore_int4(within, facts, dtype), tensors["order"])
    if "aten" in tensors:
        return AtenInt4Linear.restore(tensors, facts, dtype)
    if "turned" in tensors:
        return TurnedInt4Linear(tensors["turned"], tensors["turned_beside"], facts["scale"], int(facts["rows"]), dtype)
    return Int4Linear(tensors["codes"], tensors["beside"], facts["scale"], dtype)


def int4_kernels(device: torch.device, columns: int, group: int) -> CpuKernels | None:
    """Return our CPU kernels where they can multiply groups of this many columns."""
    return kernels_for(device, columns) if group % BLOCK == 0 else None


def dequantize_int4(codes: torch.Tensor, beside: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the weights as float32, rows × columns, of codes (rows × columns/2) and what is beside them."""
    rows, groups = beside.shape[:2]
    numbers = torch.stack((codes >> 4, codes & 15), -1).view(rows, groups, -1).float()
    return numbers.sub_(beside[..., 1:]).mul_(beside[..., :1].float() * scale).view(rows, -1)


def narrowed_exactly(scales: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return scales in 16 bits, and the power of two that they are to be multiplied with.

    A scale that is no number spoils its own group only.
    """
    largest = float(scales.where(scales.isfinite(), 0).abs().max())
    exponent = torch.frexp(torch.tensor(largest / LARGEST)).exponent.item() if largest else 0
    return scales.mul(2.0**-exponent).half(), 2.0**exponent


def _turned_beside(beside: torch.Tensor) -> torch.Tensor:
    """Return what is beside groups (rows × groups × 2) turned: … × groups × 16 × 2."""
    rows, groups, _ = beside.shape
    filled = torch.nn.functional.pad(beside, (0, 0, 0, 0, 0, -rows % LANES))
    return filled.view(-1, LANES, groups, 2).transpose(1, 2).contiguous()
