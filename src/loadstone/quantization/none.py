"""Strategy `none`: weights stay the floats that the checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

from .base import Strategy

if TYPE_CHECKING:
    import torch

    from .linear import Linear


class NoQuantization(Strategy):
    """Keeps every weight as it is; on an accelerator, in the compute dtype."""

    name = "none"
    summary = "as in the checkpoint, 16 or 32 bits a weight"

    def weight_bytes(self, part: str, rows: int, columns: int, *, dtype_bytes: int = 2) -> int:
        return rows * columns * dtype_bytes

    def quantize(self, part: str, weights: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Linear:
        import torch

        from .linear import DenseLinear

        own = reduce(torch.promote_types, [weight.dtype for weight in weights])
        kept = own if device.type == "cpu" else dtype
        joined = torch.empty(sum(len(weight) for weight in weights), weights[0].shape[1], dtype=kept, device=device)
        torch.cat([weight.to(device, kept) for weight in weights], out=joined)
        return DenseLinear(joined, dtype)
