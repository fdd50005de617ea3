"""The KV cache: keys and values of every token of every running sequence, in memory taken once.

One arena of tokens, in which each sequence holds a run of places side by side, so that attention reads plain slices
and the memory of one long conversation serves many short ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch


class KVCache:
    """Keys and values for `tokens` tokens in all.

    `keys` and `values` are layers × kv_heads × tokens × head_size. On the CPU pages are taken only as tokens come.
    """

    def __init__(
        self, layers: int, kv_heads: int, tokens: int, head_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, kv_heads, tokens, head_size)
        self.keys = _lazy(shape, dtype, device)
        self.values = _lazy(shape, dtype, device)
        self.tokens = tokens
        self._free = [(0, tokens)]  # (first place, how many), in order, never touching one another

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values when every place is taken."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def free_tokens(self) -> int:
        """How many places no sequence holds."""
        return sum(count for _, count in self._free)

    def reserve(self, count: int) -> int | None:
        """Take `count` places side by side and return the first, or None when there is no such gap now."""
        for index, (first, free) in enumerate(self._free):
            if free >= count:
                self._free[index : index + 1] = [(first + count, free - count)] if free > count else []
                return first
        return None

    def release(self, first: int, count: int) -> None:
        """Give back the places that `reserve` took."""
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (first, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


def _lazy(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages and touches none of them.
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
