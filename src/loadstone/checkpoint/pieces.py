"""Tensors in pieces: some rows each, and where their bytes lie in files. Arithmetic alone: nothing is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .spec import TensorInfo


@dataclass(frozen=True)
class Stretch:
    """`nbytes` bytes of `file` from `offset` on."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + count) of a tensor, and the stretches of files that they are made from.

    Of a tensor of one dimension a row is one number. A tensor's pieces are the same on every machine. A plain tensor's
    piece is one stretch; of one that is quantised already it is one for each of `tensor.parts`.
    """

    tensor: TensorInfo
    first: int
    count: int
    stretches: tuple[Stretch, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it has in its files."""
        return sum(one.nbytes for one in self.stretches)


def plain_pieces(tensor: TensorInfo, step: int) -> Iterator[Piece]:
    """Yield the pieces of `step` rows of a tensor that is rows of equal length in its file."""
    rows = tensor.shape[0]
    for first in range(0, rows, step):
        count = min(step, rows - first)
        yield Piece(tensor, first, count, (rows_of(tensor, first, count, rows),))


def rows_of(tensor: TensorInfo, first: int, count: int, rows: int) -> Stretch:
    """Return the bytes of rows [first, first + count) of the `rows` that `tensor` holds, all of the same length."""
    row_bytes = tensor.nbytes // rows
    return Stretch(tensor.file, tensor.offset + first * row_bytes, count * row_bytes)


def whole(tensor: TensorInfo) -> Stretch:
    """Return all bytes of a tensor."""
    return Stretch(tensor.file, tensor.offset, tensor.nbytes)
