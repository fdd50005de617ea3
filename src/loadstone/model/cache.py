"""The KV cache: keys and values of every token of every running sequence, in memory taken once.

Places come in blocks. A sequence holds a table of blocks in any order, so no memory is lost between sequences, and
sequences that begin alike can hold the same blocks. Who holds which block, and what it says, is not known here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from loadstone.quantization.kernels.words import KV_BLOCK


class KVCache:
    """Keys and values for `tokens` tokens in all, rounded up to whole blocks of KV_BLOCK.

    `keys` and `values` are layers × kv_heads × places × head_size. On the CPU pages are taken only as tokens come.
    """

    def __init__(
        self, layers: int, kv_heads: int, tokens: int, head_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.blocks = blocks_for(tokens)
        shape = (layers, kv_heads, self.blocks * KV_BLOCK, head_size)
        self.keys = _lazy(shape, dtype, device)
        self.values = _lazy(shape, dtype, device)
        self._free = [*reversed(range(self.blocks))]  # the next one last

    @property
    def tokens(self) -> int:
        """How many tokens it holds when every place is taken."""
        return self.blocks * KV_BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values when every place is taken."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def free_blocks(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks, of which there must be enough."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks were asked for and {len(self._free)} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Give back blocks that `take` gave; those given back last are taken first, while they are near the cores."""
        self._free.extend(reversed(blocks))

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of one block to another."""
        here, there = source * KV_BLOCK, target * KV_BLOCK
        for kept in (self.keys, self.values):
            kept[:, :, there : there + count] = kept[:, :, here : here + count]


def blocks_for(tokens: int) -> int:
    """Return how many blocks so many tokens take."""
    return -(-tokens // KV_BLOCK)


def block_table_of(blocks: Sequence[int]) -> torch.Tensor:
    """Return a sequence's block table as the decoder reads it: int64, on the CPU."""
    return torch.tensor(blocks, dtype=torch.int64)


def _lazy(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu" or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    # Pages straight from the system: they come one by one as tokens do, and go when nobody has the tensor any more.
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)
