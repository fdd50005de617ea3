"""Weights that can be multiplied: one class for each form that a weight is kept in.

Knows tensors, not models. Each form takes the fastest product that this device has for it, and falls back to
dequantising a few rows at a time when there is none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from .codes import BLOCK
from .kernels.cpu import CpuKernels, cpu_kernels
from .reference import dequantize_nf4

TILE_NUMBERS = 4 << 20  # numbers dequantised at a time on the slow path: 16 MB as float32
FEW_ROWS = 24  # up to here a float weight is faster read once by our loop than widened for torch's product


class Linear(ABC):
    """A weight W, rows × columns, kept in some form."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ, M × rows, for x of M × columns in the compute dtype."""

    @abstractmethod
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors that keep W, by name."""

    @abstractmethod
    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows [start, stop) of W as numbers of `dtype`."""

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of W that `ids` (M) name, M × columns."""
        raise NotImplementedError(f"{type(self).__name__} keeps no rows that can be looked up")

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


def kernels_for(device: torch.device, columns: int) -> CpuKernels | None:
    """Return our CPU kernels where they can multiply a weight of this many columns."""
    return cpu_kernels() if device.type == "cpu" and columns % BLOCK == 0 else None


class DenseLinear(Linear):
    """W as floats: float32, bfloat16 or float16."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__(*weight.shape)
        self.weight = weight
        self.dtype = dtype
        self._kernels = kernels_for(weight.device, self.columns) if dtype == torch.float32 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None and x.shape[0] <= FEW_ROWS:
            return self._kernels.dense(x.contiguous(), self.weight)
        if self.weight.dtype == x.dtype:
            return torch.nn.functional.linear(x, self.weight)
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight}

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self.weight[start:stop].to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].to(self.dtype)


class Int8Linear(Linear):
    """W as 8-bit numbers with one scale for each row: W ≈ weight · scales."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__(*weight.shape)
        self.weight = weight
        self.scales = scales
        self.dtype = dtype
        self._kernels = kernels_for(weight.device, self.columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.int8(x.float().contiguous(), self.weight, self.scales).to(x.dtype)
        if x.is_cuda:
            from ._bitsandbytes import int8_product

            return int8_product(x, self.weight, self.scales)
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"weight": self.weight, "scales": self.scales}

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return (self.weight[start:stop].float() * self.scales[start:stop, None]).to(dtype)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.weight[ids].float() * self.scales[ids].unsqueeze(-1)).to(self.dtype)


class Nf4Linear(Linear):
    """W as NF4 codes, two a byte, with a 16-bit absmax for each 64 and one float scale over all of them.

    The codes are laid out as bitsandbytes lays them out, so its kernels and ours read the same bytes. Sixteen bits
    for an absmax, against bitsandbytes' eight of double quantisation, cost 0.125 bit a weight and keep the error
    of the absmax itself below 0.05 %.
    """

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, scale: float) -> None:
        super().__init__(codes.shape[0], codes.shape[1] * 2)
        self.codes = codes
        self.absmax = absmax
        self.scale = scale
        self._kernels = kernels_for(codes.device, self.columns)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.nf4(x.float().contiguous(), self.codes, self.absmax, self.scale).to(x.dtype)
        return self._by_tiles(x)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return {"codes": self.codes, "absmax": self.absmax}

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        if self.codes.device.type == "cpu":
            from ._bitsandbytes import dequantize_nf4 as fast

            return fast(self.codes[start:stop], self.absmax[start:stop].float() * self.scale, dtype)
        return dequantize_nf4(self.codes[start:stop], self.absmax[start:stop], self.scale).to(dtype)
