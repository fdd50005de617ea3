"""NF4 and int4 in plain torch: what the kernels are held against, and what runs where there are none."""

from __future__ import annotations

import torch

from .codes import BLOCK, NF4, RANGES, ZERO_STEPS

STRIP_NUMBERS = 1 << 18  # quantised at a time, so that what lies between stays in a core's cache


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes (rows × columns/2, uint8, first weight in the high nibble) and absmax (rows × columns/64, float32).

    Works on a megabyte or so at a time, so that the float32 copy stays small.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, columns // BLOCK, device=weight.device)
    values = torch.tensor(NF4, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    step = max(1, (1 << 20) // columns)
    for start in range(0, rows, step):
        blocks = weight[start : start + step].float().view(-1, columns // BLOCK, BLOCK)
        most = blocks.abs().amax(-1)
        scaled = blocks * most.clamp(min=torch.finfo(torch.float32).tiny).reciprocal().unsqueeze(-1)
        found = torch.bucketize(scaled, middles).to(torch.uint8).view(-1, columns)
        codes[start : start + step] = found[:, 0::2] << 4 | found[:, 1::2]
        absmax[start : start + step] = most
    return codes, absmax


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the weights as float32, rows × columns."""
    values = torch.tensor(NF4, device=codes.device)
    pairs = torch.stack((values[(codes >> 4).int()], values[(codes & 15).int()]), -1)
    rows = codes.shape[0]
    blocks = pairs.view(rows, -1, BLOCK) * (absmax.float() * scale).unsqueeze(-1)
    return blocks.view(rows, -1)


def quantize_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (rows × columns/2, uint8, first weight in the high nibble), and each block's scale and zero point.

    Both are float32, rows × columns/64. W ≈ scale · (code - zero point), and of the ranges that the codes may be spread
    over each block has the one with the least error, weighed by the weights' own magnitudes.
    """
    rows, columns = weight.shape
    blocks = weight.float().view(rows, columns // BLOCK, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True)
    is_number = most < torch.inf
    is_there = is_number & (most > 1e-37)
    part = torch.where(is_there, blocks * (1 / most), 0)  # the largest is 1
    low, high = (-part).amax(-1, keepdim=True).clamp(min=0), part.amax(-1, keepdim=True).clamp(min=0)
    best: tuple[torch.Tensor, ...] = (torch.full_like(low, torch.inf), low * 0, low * 0, part * 0)
    for below, above in RANGES:
        scale = low * (below / 15) + high * (above / 15)
        factor = torch.where(scale > 0, 1 / scale, 0)
        zero = (low * (below / 15) * factor * (15 * ZERO_STEPS)).round() / ZERO_STEPS
        codes = (part * factor + zero).round().clamp(0, 15)
        error = ((codes - zero) * scale - part).square().mul(part.abs()).sum(-1, keepdim=True)
        found = (error, scale, zero, codes)
        best = tuple(torch.where(error < best[0], *pair) for pair in zip(found, best, strict=True))
    _, scale, zero, codes = best
    small = codes.to(torch.uint8).view(rows, columns)
    scale = torch.where(is_number, scale * most, most)
    return small[:, 0::2] << 4 | small[:, 1::2], scale.squeeze(-1), zero.squeeze(-1)
