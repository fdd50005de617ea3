"""NF4 and int4 in plain torch: what the kernels are held against, and what runs where there are none."""

from __future__ import annotations

import torch

from .codes import BLOCK, NF4

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

    Both are float32, rows × columns/64. W ≈ scale · (code - zero point), and 0 is one of the sixteen numbers.
    """
    rows, columns = weight.shape
    blocks = weight.float().view(rows, columns // BLOCK, BLOCK)
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = high * (1 / 15) - low * (1 / 15)
    is_number = blocks.abs().amax(-1, keepdim=True) < torch.inf
    factor = torch.where((scale > 1e-37) & is_number, torch.ones_like(scale) / scale, 0)
    zero = torch.where(is_number, (-low * factor).round(), 0)
    codes = torch.where(is_number, (blocks * factor).round().add(zero).clamp(0, 15), 0)
    small = codes.to(torch.uint8).view(rows, columns)
    return small[:, 0::2] << 4 | small[:, 1::2], scale.squeeze(-1), zero.squeeze(-1)
