"""The seam of strategies: how large a weight becomes (arithmetic alone), how it is made, and made again from a file.

A weight is packed row by row, as the disk gives them, from several threads. A strategy that needs all rows at once
says only `quantize`; one that does not gives its own `packing`, and never holds a weight as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from loadstone.checkpoint.coding import Coding
    from loadstone.checkpoint.quantized.coded import Coded

    from .linear import Linear

Facts = Mapping[str, float]


class Packing(ABC):
    """One weight on its way into the form that it is kept in."""

    @abstractmethod
    def add(self, first: int, rows: torch.Tensor) -> None:
        """Take rows [first, first + len(rows)) of W, of any float type and on the CPU.

        Rows come once each, in any order, from several threads; `rows` is good only until this returns.
        """

    def add_coded(self, first: int, rows: Coded) -> None:
        """Take a few rows from `first` on of a checkpoint that is quantised already; they are good until this returns.

        A form that keeps such codes takes them as they are, every other the numbers that they mean.
        """
        self.add(first, rows.numbers())

    @abstractmethod
    def finish(self) -> Linear:
        """Return the product, once all rows are here."""


class Strategy(ABC):
    """One way to keep and multiply the weights of a model.

    `weight_bytes` is pure arithmetic, so that a plan can be made without torch; `quantize` or `packing` does it.
    """

    name: str
    summary: str

    @abstractmethod
    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        """Return the bytes that a rows × columns matrix of `part` ("linear", "lm_head", "embedding") takes when kept.

        `dtype_bytes` is the size of one number as it is in the checkpoint, for what stays unquantised.
        """

    @abstractmethod
    def quantize(self, part: str, weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Linear:
        """Return the product y = x·Wᵀ, kept this strategy's way.

        W is the `weights` (each rows × columns, any float dtype, on the CPU) stacked by rows, so that q, k and v can
        be one product. `device` is where the result lives; `dtype` is the compute dtype there.
        """

    def packing(
        self, part: str, rows: int, columns: int, *, source: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        """Return what makes the product from rows that arrive piece by piece; `source` is their type."""
        return _Collecting(self, part, rows, columns, source, device, dtype)

    def keeps(self, coding: Coding) -> bool:
        """Tell whether a matrix of the layers that a checkpoint has in such codes is kept in these very codes."""
        return False

    def coded_bytes(self, coding: Coding, rows: int, columns: int) -> int:
        """Return the bytes that a rows × columns matrix takes whose codes are kept; no torch is needed for it."""
        return self.weight_bytes("linear", rows, columns)

    def coded_packing(
        self, coding: Coding, rows: int, columns: int, *, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        """Return what makes the product from codes that are kept, which come through `Packing.add_coded`."""
        import torch

        return self.packing("linear", rows, columns, source=torch.float32, device=device, dtype=dtype)

    def coded_layout(self, coding: Coding, device_kind: str) -> str | None:
        """Return a name for the bytes that such codes are kept in, where it is not that of `layout`."""
        return None

    @property
    def needs_whole_weights(self) -> bool:
        """Tell whether a weight is held as it was until it is quantised, which a plan has to know."""
        return type(self).packing is Strategy.packing

    def layout(self, device_kind: str) -> str | None:
        """Return a name for the bytes that `quantize` makes for a kind of device, or None when none are to be kept.

        Quantised weights are kept on disk under this name and restored from there, so it must change whenever the same
        weight would become other bytes: with the strategy's settings, and with its code.
        """
        return None

    def restore(self, part: str, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        """Return the product whose `tensors()` and `facts` these are, on their device; they may be read-only."""
        raise NotImplementedError(f"{self.name} has a layout, and so needs `restore`")


class _Collecting(Packing):
    """Holds the rows as they come, and quantises when all are here."""

    def __init__(
        self, strategy: Strategy, part: str, rows: int, columns: int, source: torch.dtype, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        import torch

        self._whole = torch.empty(rows, columns, dtype=source)
        self._strategy, self._rest = strategy, (device, dtype)
        self._part = part

    def add(self, first: int, rows: torch.Tensor) -> None:
        self._whole[first : first + len(rows)] = rows

    def finish(self) -> Linear:
        return self._strategy.quantize(self._part, [self._whole], *self._rest)


class Packed(Strategy):
    """A strategy that packs rows as they come; whole weights go the same way."""

    @abstractmethod
    def packing(
        self, part: str, rows: int, columns: int, *, source: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> Packing: ...

    def quantize(self, part: str, weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Linear:
        from functools import reduce

        import torch

        source = reduce(torch.promote_types, [weight.dtype for weight in weights])
        rows = sum(len(weight) for weight in weights)
        packing = self.packing(part, rows, weights[0].shape[1], source=source, device=device, dtype=dtype)
        first = 0
        for weight in weights:
            packing.add(first, weight.contiguous())
            first += len(weight)
        return packing.finish()
