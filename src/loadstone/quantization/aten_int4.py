"""aten's own product of 4-bit integers: on CPUs where our kernels cannot be had, on Apple's GPUs and on NVIDIA's.

Each kind of device has a packing of its own, which another version of torch may change. Whether the product is right
here is tried once, on a small weight. Where aten has no vectors for it, it is slower than dequantising, and not used.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from functools import cache

import torch

from loadstone.telemetry import emit

from .base import Facts
from .linear import Linear

operations = torch.ops.aten
functional = torch.nn.functional

GROUPS = (256, 128, 64, 32)  # columns of a scale that aten takes; a larger group is several of one
ROWS = 16  # rows are whole multiples of this many
STRIP = 1 << 20  # codes widened to 32 bits at a time, for the packing on the CPU
SLICE = 256  # columns that are dequantised at a time by products
FEW = 48  # rows of x that aten multiplies; for more, dequantising once pays
_found: dict[str, bool] = {}
_lock = threading.Lock()


def aten_group(columns: int, group: int) -> int | None:
    """Return the columns of a scale as aten is to take them, or None where it cannot."""
    return next((size for size in GROUPS if group % size == 0 and columns % size == 0), None)


def aten_multiplies(device: torch.device, columns: int, group: int) -> bool:
    """Tell whether aten's product is right and fast on this device, and takes groups of this many columns."""
    return aten_group(columns, group) is not None and _is_right(device)


def aten_packing_name(device: torch.device) -> str:
    """Return a name for the bytes that a weight packed for this device has."""
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
    return f"{capability.lower()}-{'.'.join(torch.__version__.split('.')[:2])}"


def compute_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type that aten multiplies in; but on Apple's GPUs, its fast products are of bfloat16 only."""
    return dtype if device.type == "mps" else torch.bfloat16


class AtenInt4Linear(Linear):
    """W as aten's packing of codes for its device, with scale and zero of each group side by side: groups × rows × 2.

    A zero is what aten adds to (code - 8) · scale. Both are in the type of the product, so scales may be rounded to it.
    Rows are filled up to sixteens with zeros.
    """

    def __init__(self, packed: torch.Tensor, beside: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__(rows, columns)
        self.packed, self.beside, self.dtype = packed, beside, dtype
        self.group = columns // beside.shape[0]

    @classmethod
    def of(
        cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> AtenInt4Linear:
        """Return the weight of codes (rows × columns/2, the first of two in the high nibble, on the CPU), scales and
        zero points (rows × groups)."""
        rows, columns = codes.shape[0], codes.shape[1] * 2
        group = columns // scales.shape[1]
        taken = aten_group(columns, group)
        assert taken is not None  # or the caller asked nobody
        kept_as = compute_type(device, dtype)
        scales = scales.to(kept_as).float()
        beside = torch.stack((scales, scales * (8 - zeros)), -1).repeat_interleave(group // taken, 1)
        beside = functional.pad(beside, (0, 0, 0, 0, 0, -rows % ROWS)).transpose(0, 1).contiguous()
        packed = _pack(functional.pad(codes, (0, 0, 0, -rows % ROWS)), device)
        return cls(packed, beside.to(device, kept_as), rows, columns, dtype)

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> AtenInt4Linear:
        """Return the weight whose `tensors()` and `facts` these are."""
        return cls(tensors["aten"], tensors["beside"], int(facts["rows"]), int(facts["columns"]), dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > FEW and not x.is_cuda:
            return self._by_tiles(x)
        return self._product(x.to(self.beside.dtype))[:, : self.rows].to(x.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        name = "_weight_int4pack_mm_for_cpu" if x.device.type == "cpu" else "_weight_int4pack_mm"
        y: torch.Tensor = getattr(operations, name)(x.contiguous(), self.packed, self.group, self.beside)
        return y

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"aten": self.packed, "beside": self.beside}

    @property
    def facts(self) -> Facts:
        return {"rows": float(self.rows), "columns": float(self.columns)}

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if self.packed.device.type not in ("cpu", "mps"):
            return self._columns(start, stop, dtype)
        numbers = (
            unpacked(self.packed, self.columns, start, stop).float().view(stop - start, len(self.beside), self.group)
        )
        scales, zeros = self.beside[:, start:stop].float().permute(2, 1, 0).unsqueeze(-1)
        return numbers.sub_(8).mul_(scales).add_(zeros).view(stop - start, self.columns).to(dtype)

    def _columns(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Dequantise where only aten knows the packing: the products of unit vectors are W's columns."""
        found = torch.empty(stop - start, self.columns, dtype=dtype, device=self.packed.device)
        for first in range(0, self.columns, SLICE):
            last = min(first + SLICE, self.columns)
            units = torch.zeros(last - first, self.columns, dtype=self.beside.dtype, device=self.packed.device)
            units[torch.arange(last - first), torch.arange(first, last)] = 1
            found[:, first:last] = self._product(units)[:, start:stop].T
        return found


def _pack(codes: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        columns = codes.shape[1] * 2
        inner = next(tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0)
        packed: torch.Tensor = operations._convert_weight_to_int4pack(codes.to(device), inner)
        return packed
    # Rows that are packed together take the place that they took before.
    step = max(1, STRIP // (codes.shape[1] * 2 * 256)) * 256
    for start in range(0, len(codes), step):
        part = codes[start : start + step]
        numbers = torch.stack((part >> 4, part & 15), -1).view(len(part), -1)
        part.copy_(_pack_on_cpu(numbers).view_as(part))
    return codes


def _pack_on_cpu(numbers: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = operations._convert_weight_to_int4pack_for_cpu(numbers.int(), 2)
    return packed


def unpacked(packed: torch.Tensor, columns: int, start: int, stop: int) -> torch.Tensor:
    """Return the codes of rows [start, stop) of what is packed for the CPU or Apple's GPUs, rows × columns, uint8."""
    if packed.device.type == "mps":  # row by row, whatever its shape says; the first of two in the low nibble
        rows = packed.view(torch.uint8).view(-1, columns // 2)[start:stop]
        return torch.stack((rows & 15, rows >> 4), -1).view(-1, columns)
    together, found = _rows_together(), packed.new_empty(stop - start, columns)
    for first in range(start // together * together, stop, together):
        block = packed[first : first + together]
        bytes_of_columns = block.reshape(columns, -1)
        nibbles = torch.stack((bytes_of_columns & 15, bytes_of_columns >> 4), -1).view(columns, -1)
        rows = torch.empty_like(nibbles)
        rows[:, _order(len(block))] = nibbles
        wanted = rows.T[max(start - first, 0) : stop - first]
        found[max(first - start, 0) :][: len(wanted)] = wanted
    return found


@cache
def _rows_together() -> int:
    """Return how many rows aten packs together on this processor: of each column their codes, then of the next."""
    numbers = torch.zeros(128, 32, dtype=torch.uint8)
    numbers[:, 1] = 1
    return int(_pack_on_cpu(numbers).flatten().nonzero()[0]) * 2


@cache
def _order(rows: int) -> torch.Tensor:
    """Return which of so many rows each nibble of a column is of, low ones first."""
    index, found = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    for shift in (0, 4):
        packed = _pack_on_cpu((index >> shift & 15).unsqueeze(1).repeat(1, 32)).flatten()[: rows // 2].long()
        found += torch.stack((packed & 15, packed >> 4), -1).flatten() << shift
    return found


def _is_right(device: torch.device) -> bool:
    """Tell whether aten has a fast product on this kind of device, and it agrees with what it should be; tried once."""
    if device.type == "cpu" and not _has_vectors():
        return False
    with _lock:
        if device.type not in _found:
            reason = _wrong(device)
            _found[device.type] = reason is None
            if reason is not None:
                emit("int4.warning", device=str(device), reason=reason, instead="dequantise, then torch's products")
        return _found[device.type]


def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform != "win32"


def _wrong(device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (80, 64), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 17, (80, 2), generator=generator)
    scales, x = torch.rand(80, 2, generator=generator), torch.randn(3, 128, generator=generator)
    numbers = torch.stack((codes >> 4, codes & 15), -1).view(80, 2, 64) - zeros.unsqueeze(-1)
    weight = (numbers * scales.unsqueeze(-1)).view(80, 128)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    try:
        made = AtenInt4Linear.of(codes, scales, zeros, device, dtype)
        found, dequantized = made.multiply(x.to(device, dtype)), made.dequantize(0, 80, dtype)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for one, wanted in ((found, x @ weight.T), (dequantized, weight)):
        if not float((one.cpu().float() - wanted).norm() / wanted.norm()) < 0.02:
            return "aten's product of 4-bit integers disagrees with torch"
    return None
