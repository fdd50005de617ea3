"""Weights that can be multiplied: one class for each form that a weight is kept in.

Knows tensors, not models. Each form takes the fastest product that this device has for it, and falls back to
dequantising a few rows at a time when there is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch

from .base import Facts
from .codes import BLOCK
from .kernels.cpu import Call, CpuKernels, Work, cpu_kernels
from .reference import dequantize_nf4
from .turned import plain_rows, plain_rows_at, whole_groups

functional = torch.nn.functional

TILE_NUMBERS = 4 << 20  # numbers dequantised at a time on the slow path: 16 MB as float32
FEW_ROWS = 24  # up to here a float weight is faster read once by our loop than widened for torch's product


class Linear(ABC):
    """A weight W, rows × columns, kept in some form."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ, M × rows, for x of M × columns in the compute dtype.

        A form without a product of its own dequantises a few rows at a time, so that W never stands in memory whole.
        """
        return self._by_tiles(x)

    def __call__(
        self, x: torch.Tensor, *, norm: torch.Tensor | None = None, epsilon: float = 0.0, gated: bool = False,
        bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return f(x)·Wᵀ + bias + residual, M × rows.

        f is nothing; or an RMS norm over each row with weights `norm`; or, for `gated`, silu of the first half of
        each row (M × 2·columns) times the second. A form with a kernel for all of it overrides this.
        """
        if norm is not None:
            x = functional.rms_norm(x, (self.columns,), norm, epsilon)
        elif gated:
            gate, up = x.chunk(2, -1)
            x = functional.silu(gate).mul_(up)
        y = self.multiply(x)
        if bias is not None:
            y = y.add_(bias)
        return y if residual is None else y.add_(residual)

    @abstractmethod
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that keep W, by name."""

    @property
    def facts(self) -> Facts:
        """The numbers that are part of W beside its tensors, by name."""
        return {}

    @abstractmethod
    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows [start, stop) of W as numbers of `dtype`."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of W that `ids` (M) name, M × columns."""
        raise NotImplementedError(f"{type(self).__name__} keeps no rows that can be looked up")

    def part(self, start: int, stop: int) -> Linear:
        """Return rows [start, stop) of W as a weight of its own, over the same memory."""
        if not 0 <= start < stop <= self.rows:
            raise ValueError(f"rows {start} to {stop} of a weight that has {self.rows}")
        return self if (start, stop) == (0, self.rows) else self._part(start, stop) or Rows(self, start, stop)

    def _part(self, start: int, stop: int) -> Linear | None:
        """Return rows [start, stop) in this form, or None where they cannot stand alone in it."""
        return None

    def multiply_back(self, y: torch.Tensor) -> torch.Tensor:
        """Return y·W, M × columns, for y of M × rows: what a change of the product means for x."""
        x = y.new_zeros(y.shape[0], self.columns)
        for start, stop in self._tiles():
            x.addmm_(y[:, start:stop], self.dequantize(start, stop, y.dtype))
        return x

    @property
    def nbytes(self) -> int:
        """Bytes that W takes as it is kept."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _by_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a few dequantised rows at a time, so that W never stands in memory whole."""
        y = x.new_empty(x.shape[0], self.rows)
        for start, stop in self._tiles():
            y[:, start:stop] = x @ self.dequantize(start, stop, x.dtype).T
        return y

    def _tiles(self) -> Iterator[tuple[int, int]]:
        step = max(1, TILE_NUMBERS // self.columns)
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class Rows(Linear):
    """Rows [start, stop) of a weight whose form does not let them stand alone: dequantised, a few at a time."""

    def __init__(self, whole: Linear, start: int, stop: int) -> None:
        super().__init__(stop - start, whole.columns)
        self.whole = whole
        self.start = start

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.whole.tensors()

    @property
    def facts(self) -> Facts:
        return self.whole.facts

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.whole.dequantize(self.start + start, self.start + stop, dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.whole.lookup(ids + self.start)


def kernels_for(device: torch.device, columns: int) -> CpuKernels | None:
    """Return our CPU kernels where they can multiply a weight of this many columns."""
    return cpu_kernels() if device.type == "cpu" and columns % BLOCK == 0 else None


class KernelLinear(Linear):
    """A form that our CPU kernels multiply, with norm, gate, bias and residual in the same pass."""

    kernels: CpuKernels | None
    kind: str
    group = BLOCK
    scale = 1.0

    @property
    @abstractmethod
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W and its scales, as `CpuKernels.product` takes them."""

    def takes(self, count: int) -> bool:
        """Tell whether the kernel is the best way to multiply `count` rows of x (float32)."""
        return self.kernels is not None

    def __call__(
        self, x: torch.Tensor, *, norm: torch.Tensor | None = None, epsilon: float = 0.0, gated: bool = False,
        bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if self.kernels is None or x.dtype != torch.float32 or not self.takes(x.shape[0]):
            return super().__call__(x, norm=norm, epsilon=epsilon, gated=gated, bias=bias, residual=residual)
        return self.kernels.product(
            self.kind, x.contiguous(), *self.packed, rows=self.rows, columns=self.columns, group=self.group,
            scale=self.scale, norm=norm, epsilon=epsilon, gated=gated, bias=bias, residual=residual,
        )  # fmt: skip

    def call(
        self, x: torch.Tensor, y: torch.Tensor, work: Work, *, norm: torch.Tensor | None = None, epsilon: float = 0.0,
        gated: bool = False, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    ) -> Call:  # fmt: skip
        """Return the kernel's call that writes the product of x into y, where it `takes` x."""
        assert self.kernels is not None
        return self.kernels.product_call(
            self.kind, x, *self.packed, y=y, work=work, group=self.group, scale=self.scale,
            norm=norm, epsilon=epsilon, gated=gated, bias=bias, residual=residual,
        )  # fmt: skip


class DenseLinear(KernelLinear):
    """W as floats: float32, bfloat16 or float16."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__(*weight.shape)
        self.weight = weight
        self.dtype = dtype
        self.kind = str(weight.dtype).removeprefix("torch.")
        self.kernels = kernels_for(weight.device, self.columns)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, None

    def takes(self, count: int) -> bool:
        return super().takes(count) and count <= FEW_ROWS

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight) if self.weight.dtype == x.dtype else self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight}

    def _part(self, start: int, stop: int) -> Linear:
        return DenseLinear(self.weight[start:stop], self.dtype)

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[start:stop].to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].to(self.dtype)


class Int8Linear(KernelLinear):
    """W as 8-bit numbers with one scale for each row: W ≈ weight · scales."""

    kind = "int8"

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__(*weight.shape)
        self.weight = weight
        self.scales = scales
        self.dtype = dtype
        kernels = kernels_for(weight.device, self.columns)
        self.kernels = None if kernels is not None and kernels.is_wide else kernels  # which want it turned

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.scales

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            from ._bitsandbytes import int8_product

            return int8_product(x, self.weight, self.scales)
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def _part(self, start: int, stop: int) -> Linear | None:
        return Int8Linear(self.weight[start:stop], self.scales[start:stop], self.dtype)

    def rows_of(self, start: int, stop: int) -> torch.Tensor:
        """Return the numbers of rows [start, stop)."""
        return self.weight[start:stop]

    def rows_at(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the rows that `ids` name."""
        return self.weight[ids]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.rows_of(start, stop).float() * self.scales[start:stop, None]).to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.rows_at(ids).float() * self.scales[ids].unsqueeze(-1)).to(self.dtype)


class TurnedInt8Linear(Int8Linear):
    """The same, turned for the wide products (`turned.py`): groups × words × 16 × 4."""

    def __init__(self, turned: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        KernelLinear.__init__(self, len(scales), turned.shape[1] * 4)
        self.turned = turned
        self.scales = scales
        self.dtype = dtype
        self.kernels = kernels_for(turned.device, self.columns)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The numbers, rows × columns, in new memory."""
        return self.rows_of(0, self.rows)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.turned, self.scales

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"turned": self.turned, "scales": self.scales}

    def _part(self, start: int, stop: int) -> Linear | None:
        groups = whole_groups(start, stop)
        if groups is None:
            return None
        return TurnedInt8Linear(self.turned[groups], self.scales[start:stop], self.dtype)

    def rows_of(self, start: int, stop: int) -> torch.Tensor:
        return plain_rows(self.turned, start, stop)

    def rows_at(self, ids: torch.Tensor) -> torch.Tensor:
        return plain_rows_at(self.turned, ids)


class Nf4Linear(KernelLinear):
    """W as NF4 codes, two a byte, with a 16-bit absmax for each 64 and one float scale over all of them.

    The codes are laid out as bitsandbytes lays them out. Sixteen bits for an absmax, against its eight of double
    quantisation, cost 0.125 bit a weight and keep the error of the absmax itself below 0.05 %.
    """

    kind = "nf4"

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__(codes.shape[0], codes.shape[1] * 2)
        self.codes = codes
        self.absmax = absmax
        self.scale = scale
        self.dtype = dtype
        self.kernels = kernels_for(codes.device, self.columns)

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.codes, self.absmax

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    @property
    def facts(self) -> Facts:
        return {"scale": self.scale}

    def _part(self, start: int, stop: int) -> Linear | None:
        return Nf4Linear(self.codes[start:stop], self.absmax[start:stop], self.scale, self.dtype)

    def rows_of(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and absmax of rows [start, stop)."""
        return self.codes[start:stop], self.absmax[start:stop]

    def rows_at(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and absmax of the rows that `ids` name."""
        return self.codes[ids], self.absmax[ids]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        codes, absmax = self.rows_of(start, stop)
        if codes.is_cpu and find_spec("bitsandbytes") is not None:
            from ._bitsandbytes import dequantize_nf4 as by_bitsandbytes

            return by_bitsandbytes(codes, absmax.float() * self.scale, dtype)
        return dequantize_nf4(codes, absmax, self.scale).to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(*self.rows_at(ids), self.scale).to(self.dtype)


class TurnedNf4Linear(Nf4Linear):
    """The same, turned for the wide products (`turned.py`): codes are groups × words × 16 × 4, absmax as its blocks."""

    def __init__(
        self, turned: torch.Tensor, turned_absmax: torch.Tensor, scale: float, rows: int, dtype: torch.dtype
    ) -> None:
        KernelLinear.__init__(self, rows, turned.shape[1] * 8)
        self.turned, self.turned_absmax = turned, turned_absmax
        self.scale = scale
        self.dtype = dtype
        self.kernels = kernels_for(turned.device, self.columns)

    @property
    def codes(self) -> torch.Tensor:  # type: ignore[override]
        """The codes as bitsandbytes has them, in new memory."""
        return self.rows_of(0, self.rows)[0]

    @property
    def absmax(self) -> torch.Tensor:  # type: ignore[override]
        """The absmax of each block, rows × blocks, in new memory."""
        return self.rows_of(0, self.rows)[1]

    @property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.turned, self.turned_absmax

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"turned": self.turned, "turned_absmax": self.turned_absmax}

    @property
    def facts(self) -> Facts:
        return {"scale": self.scale, "rows": float(self.rows)}

    def _part(self, start: int, stop: int) -> Linear | None:
        groups = whole_groups(start, stop)
        if groups is None:
            return None
        turned, absmax = self.turned[groups], self.turned_absmax[groups]
        return TurnedNf4Linear(turned, absmax, self.scale, stop - start, self.dtype)

    def rows_of(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_rows(self.turned, start, stop), plain_rows(self.turned_absmax, start, stop)

    def rows_at(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_rows_at(self.turned, ids), plain_rows_at(self.turned_absmax, ids)
