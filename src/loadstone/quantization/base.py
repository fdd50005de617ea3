"""The seam of strategies: how large a weight becomes (arithmetic alone), and how it is made (with torch)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .linear import Linear


class Strategy(ABC):
    """One way to keep and multiply the weights of a model.

    `weight_bytes` is pure arithmetic, so that a plan can be made without torch; `quantize` does it.
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
