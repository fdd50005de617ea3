"""What strategies have in common that keep the layers in 4 bits, and what maps tokens in and out otherwise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from .base import Facts, Packed, Packing
from .codes import BLOCK, padded
from .int8 import Int8, int8_layout, restore_int8
from .none import NoQuantization

if TYPE_CHECKING:
    import torch

    from .linear import Linear

Kept = Literal["none", "8bit", "4bit"]


class FourBits(Packed):
    """Keeps the layers' matrices in 4 bits, `beside` bytes a block of 64 beside them, and embedding and head in 8.

    `embedding` and `lm_head` say how these two are kept: "none", "8bit" or "4bit", which is as the layers are. A tied
    head is its embedding. Both are 8 bits because of what `benchmarks.quality` measured with the others: beside floats
    8 bits cost less than a thousandth of perplexity, while a head in NF4 cost a quarter, to save 6 % of what a token of
    a 7B model reads.
    """

    beside: int

    def __init__(self, name: str | None = None, *, embedding: Kept = "8bit", lm_head: Kept = "8bit") -> None:
        self.name = name or self.name
        self._kept: dict[str, Kept] = {"embedding": embedding, "lm_head": lm_head}

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        other = self._other(part, columns)
        if other is not None:
            return other.weight_bytes(part, rows, columns, dtype_bytes=dtype_bytes)
        rows = padded(rows)  # a little too much for a few odd rows where they are not turned
        return rows * columns // 2 + self.beside * (rows * columns // BLOCK)

    def packing(
        self, part: str, rows: int, columns: int, *, source: torch.dtype, device: torch.device, dtype: torch.dtype
    ) -> Packing:
        other = self._other(part, columns)
        if other is not None:
            return other.packing(part, rows, columns, source=source, device=device, dtype=dtype)
        return self.packing_in_four(rows, columns, device, dtype)

    def _other(self, part: str, columns: int) -> Packed | None:
        """Return the strategy that keeps a matrix which is not kept in 4 bits; these want rows of whole blocks."""
        kept = self._kept.get(part, "4bit")
        if kept == "none":
            return NoQuantization()
        return Int8() if kept == "8bit" or columns % BLOCK else None

    def layout(self, device_kind: str) -> str:
        others = [f"{part}-{kept}" for part, kept in self._kept.items() if kept != "8bit"]
        return "+".join([self.layout_in_four(device_kind), int8_layout(device_kind), *others])

    def restore(self, part: str, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        from .linear import DenseLinear

        if "scales" in tensors:
            return restore_int8(tensors, dtype)
        if "weight" in tensors:
            return DenseLinear(tensors["weight"], dtype)
        return self.restore_in_four(tensors, facts, dtype)

    @abstractmethod
    def packing_in_four(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Packing:
        """Return what makes a matrix of 4 bits."""

    @abstractmethod
    def layout_in_four(self, device_kind: str) -> str:
        """Return a name for the bytes that it then has on a kind of device."""

    @abstractmethod
    def restore_in_four(self, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        """Return the product of such a matrix."""
