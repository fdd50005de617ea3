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

    `keys` and `values` are layers × kv_heads × places × head_size. On the CPU pages are taken only as tokens come, and
    on Linux those of blocks that nobody holds can go back to the system.
    """

    def __init__(
        self, layers: int, kv_heads: int, tokens: int, head_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.blocks = blocks_for(tokens)
        shape = (layers, kv_heads, self.blocks * KV_BLOCK, head_size)
        self._memory: list[mmap.mmap] = []  # of keys and of values, where it is pages of the system
        self.keys = self._arena(shape, dtype, device)
        self.values = self._arena(shape, dtype, device)
        self._free = [*reversed(range(self.blocks))]  # the next one last
        self._touched: set[int] = set()  # blocks that somebody had since pages were given back

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
        taken = [self._free.pop() for _ in range(count)]
        self._touched.update(taken)
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Give back blocks that `take` gave; those given back last are taken first, while they are near the cores."""
        self._free.extend(reversed(blocks))

    @property
    def can_give_pages_back(self) -> bool:
        """Whether the memory of single blocks can go back to the system."""
        return bool(self._memory) and hasattr(mmap, "MADV_REMOVE")

    def give_pages_back(self) -> int:
        """Return to the system what it gave for blocks that nobody holds now; return how many blocks that were.

        What they said is gone. Pages that have a part of another block stay.
        """
        stale = self._touched.intersection(self._free)
        if not stale or not self.can_give_pages_back:
            return 0
        self._touched -= stale
        layers, heads, places, size = self.keys.shape
        plane = places * size * self.keys.itemsize  # bytes of one layer's head
        block = KV_BLOCK * size * self.keys.itemsize
        try:
            for first, last in _runs(sorted(self._free)):
                if stale.isdisjoint(range(first, last)):
                    continue
                for begin in range(0, layers * heads * plane, plane):
                    self._let_go(begin + first * block, begin + last * block)
        except OSError:
            self._memory.clear()  # a system that does not know how is not asked again
            return 0
        return len(stale)

    def _let_go(self, start: int, stop: int) -> None:
        """Give back the pages that are within these bytes of the keys, and of the values."""
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            for memory in self._memory:
                # The mapping is a shared one, whose pages MADV_DONTNEED would only hide.
                memory.madvise(mmap.MADV_REMOVE, start, stop - start)

    def _arena(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        # Pages straight from the system: they come one by one as tokens do, and go when nobody has the tensor any more.
        self._memory.append(mmap.mmap(-1, nbytes))
        return torch.frombuffer(self._memory[-1], dtype=dtype).view(shape)

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


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the stretches [first, last) of numbers that follow one another; they are in order."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found
