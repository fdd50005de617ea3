"""Weights as the wide products want them: of sixteen rows a 32-bit word each, side by side, then each one's next.

So a vector is loaded in one piece, and a thread reads memory from beginning to end. Rows beyond the last are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .codes import LANES, padded

if TYPE_CHECKING:
    from .kernels.cpu import CpuKernels

STRIP_NUMBERS = 1 << 18  # quantised and then turned: both find them in the core's cache


def turned_space(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for rows of `size` bytes when they are turned: groups × words × 16 × 4, zeros."""
    return torch.zeros(padded(rows) // LANES, size // 4, LANES, 4, dtype=dtype)


def turn_in_strips(
    kernels: CpuKernels, rows: torch.Tensor, turned: torch.Tensor, first: int,
    quantize: Callable[[torch.Tensor, torch.Tensor, slice], object],
) -> None:  # fmt: skip
    """Quantise rows of a weight and lay them turned at rows [first, first + len(rows)) of `turned`, a few at a time.

    `quantize(rows, space, where)` writes some rows into `space`, one after the other; `where` they are in the weight.
    """
    step = max(1, STRIP_NUMBERS // rows.shape[1])
    space = torch.empty(min(step, len(rows)), turned.shape[1] * 4, dtype=turned.dtype)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        quantize(part, space[: len(part)], slice(first + start, first + start + len(part)))
        kernels.turn(space[: len(part)], turned, first + start)


def turned_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales (rows × blocks) turned: groups × blocks × 16."""
    rows, blocks = scales.shape
    whole = torch.nn.functional.pad(scales, (0, 0, 0, padded(rows) - rows))
    return whole.view(-1, LANES, blocks).transpose(1, 2).contiguous()


def whole_groups(start: int, stop: int) -> slice | None:
    """Return the groups that have rows [start, stop), or None where the first begins with other rows."""
    return None if start % LANES else slice(start // LANES, padded(stop) // LANES)


def plain_rows(turned: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return rows [start, stop) of what is turned (groups × N × 16 × …), one after the other: rows × (N · …)."""
    first, last = start // LANES, -(-stop // LANES)
    rows = turned[first:last].transpose(1, 2).flatten(0, 1)
    return rows[start - first * LANES : stop - first * LANES].flatten(1)


def plain_rows_at(turned: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the rows that `ids` name, as `plain_rows` does."""
    return turned[ids // LANES, :, ids % LANES].flatten(1)
