"""Whole numbers of 4 or 8 bits out of the 32-bit words that AWQ, GPTQ and compressed-tensors pack them in."""

from __future__ import annotations

import torch

from loadstone.checkpoint.spec import TensorInfo

from .base import damaged, viewed


def unpack_across(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows × (words · 32/bits) codes (uint8) of rows of words (int32); the first code is in the lowest bits."""
    # A word's bytes lie from the lowest on, in files as in the machines that there are.
    several = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return several
    return torch.stack((several & 15, several >> 4), -1).flatten(1)


def unpack_down(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the same of words whose codes belong to rows one below the other: (words · 32/bits) × columns."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(1, -1, 1)
    several: torch.Tensor = (words.unsqueeze(1) >> shifts) & (2**bits - 1)
    return several.to(torch.uint8).flatten(0, 1)


def column_groups(tensor: TensorInfo, raw: torch.Tensor, groups: int) -> torch.Tensor | None:
    """Return the group of each column, as the bytes of a `g_idx` (int32) say it; None where they are side by side.

    Raises CheckpointError for a group that there is not, or that has not as many columns as the others.
    """
    columns = tensor.shape[1]
    order = viewed(raw, torch.int32, columns).long()
    if bool((order == -1).all()):  # compressed-tensors' word for "not used"
        return None
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        damaged(tensor, f"its g_idx names groups from {low} to {high}; there are {groups}")
    width = -(-columns // groups)
    if columns % groups == 0 and not bool((order.bincount(minlength=groups) == width).all()):
        damaged(tensor, f"its g_idx has not {width} columns in each of {groups} groups")
    return None if torch.equal(order, torch.arange(columns) // width) else order
