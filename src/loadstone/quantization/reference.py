"""NF4 in plain torch: what the kernels are held against, and what runs where there are none."""

from __future__ import annotations

import torch

from .codes import BLOCK, NF4


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
