"""Some rows of a weight as a checkpoint has them quantised: what strategies take, whichever format they came in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Coded(ABC):
    """Rows of a weight in codes; tensors are good only as long as the bytes that they were made from."""

    @abstractmethod
    def numbers(self) -> torch.Tensor:
        """Return the numbers that the codes mean: float32, rows × columns, in new memory."""


@dataclass(frozen=True, eq=False)
class TableRows(Coded):
    """Codes of 4 bits that stand for the values of a table, times a scale for each block of columns.

    `codes` are uint8, rows × columns/2, the first of two in the high bits; `absmax` is float32, rows × blocks.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor

    def numbers(self) -> torch.Tensor:
        rows, blocks = self.absmax.shape
        pairs = torch.stack((self.table[(self.codes >> 4).int()], self.table[(self.codes & 15).int()]), -1)
        return (pairs.view(rows, blocks, -1) * self.absmax.unsqueeze(-1)).view(rows, -1)


@dataclass(frozen=True, eq=False)
class Int8Rows(Coded):
    """Whole numbers of 8 bits with one scale a row: `values` int8, rows × columns; `scales` float32, rows."""

    values: torch.Tensor
    scales: torch.Tensor

    def numbers(self) -> torch.Tensor:
        return self.values.float() * self.scales.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class GroupedRows(Coded):
    """Whole numbers, with a scale and a zero for each group of columns: W = (codes - zeros) · scales.

    `codes` are uint8 or int8, rows × columns; `scales` and `zeros` float32, rows × groups. Columns are in groups side
    by side, or as `groups` says: int64, the group of each column.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        if self.groups is not None:
            return (self.codes - self.zeros[:, self.groups]).mul_(self.scales[:, self.groups])
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        width = -(-columns // groups)
        if columns % groups:  # the last group has fewer columns than the others
            there = torch.arange(columns) // width
            return (self.codes - self.zeros[:, there]).mul_(self.scales[:, there])
        grouped = self.codes.view(rows, groups, width) - self.zeros.unsqueeze(-1)
        return grouped.mul_(self.scales.unsqueeze(-1)).view(rows, columns)


@dataclass(frozen=True, eq=False)
class PlainRows(Coded):
    """Rows whose numbers are worked out already: float32."""

    values: torch.Tensor

    def numbers(self) -> torch.Tensor:
        return self.values
