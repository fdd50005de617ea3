"""The blocks of the KV cache: never held twice, all given back."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.hardware import resident_bytes
from loadstone.model import KVCache
from loadstone.quantization.kernels.words import KV_BLOCK

BLOCKS = 12


def _cache(tokens: int = BLOCKS * KV_BLOCK) -> KVCache:
    return KVCache(1, 1, tokens, 2, torch.device("cpu"), torch.float16)


# A number from 0 on asks for so many blocks, one below gives the oldest, the next … of those that are held back.
@given(st.lists(st.integers(0, BLOCKS) | st.integers(-6, -1), max_size=60))
def test_blocks_are_never_held_twice_and_all_come_back(steps: list[int]) -> None:
    """Whatever is taken and given back in whatever order, no block has two holders and none is lost."""
    cache = _cache()
    held: list[list[int]] = []
    for step in steps:
        if 0 <= step <= cache.free_blocks:
            held.append(cache.take(step))
        elif step < 0 and held:
            cache.give_back(held.pop(-step % len(held)))
        blocks = [block for one in held for block in one]
        assert len(set(blocks)) == len(blocks)
        assert all(0 <= block < BLOCKS for block in blocks)
        assert cache.free_blocks == BLOCKS - len(blocks)
    for one in held:
        cache.give_back(one)
    assert sorted(cache.take(BLOCKS)) == [*range(BLOCKS)]


def test_more_than_is_free_is_refused() -> None:
    """Nothing is taken then."""
    cache = _cache()
    cache.take(BLOCKS - 1)
    with pytest.raises(ValueError, match="2 blocks were asked for and 1 are free"):
        cache.take(2)
    assert cache.free_blocks == 1


def test_a_copied_block_says_the_same_as_far_as_it_was_copied() -> None:
    """The first tokens of a block come over, in every layer and head; the rest of the target stays."""
    cache = KVCache(2, 3, 2 * KV_BLOCK, 4, torch.device("cpu"), torch.float16)
    for kept in (cache.keys, cache.values):
        kept.copy_(torch.randn(kept.shape))
    before = cache.keys.clone(), cache.values.clone()
    cache.copy(0, 1, 5)
    for kept, old in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(kept[:, :, KV_BLOCK : KV_BLOCK + 5], old[:, :, :5])
        assert torch.equal(kept[:, :, KV_BLOCK + 5 :], old[:, :, KV_BLOCK + 5 :])
        assert torch.equal(kept[:, :, :KV_BLOCK], old[:, :, :KV_BLOCK])


def test_sizes_are_said_before_pages_are_taken() -> None:
    """Layers × kv heads × tokens × head size, twice, in the cache's type, in whole blocks."""
    cache = KVCache(3, 2, 6 * KV_BLOCK - 1, 8, torch.device("cpu"), torch.float16)
    assert cache.keys.shape == cache.values.shape == (3, 2, 6 * KV_BLOCK, 8)
    assert cache.nbytes == 2 * 3 * 2 * cache.tokens * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cache_holds_what_is_written(dtype: torch.dtype) -> None:
    """The memory is the tensor's own, of its type, and writable."""
    cache = KVCache(1, 1, KV_BLOCK, 2, torch.device("cpu"), dtype)
    cache.keys[0, 0, 3] = 1.5
    assert cache.keys.dtype == dtype
    assert cache.keys[0, 0, :4].tolist() == [[0, 0]] * 3 + [[1.5, 1.5]]


def test_a_cache_for_nothing_is_empty() -> None:
    """It takes no memory, and has no block to give."""
    cache = KVCache(2, 1, 0, 8, torch.device("cpu"), torch.float16)
    assert (cache.nbytes, cache.tokens, cache.free_blocks) == (0, 0, 0)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes single pages back")


def _resident(cache: KVCache) -> int:
    found = resident_bytes((one.data_ptr(), one.nbytes) for one in (cache.keys, cache.values))
    assert found is not None
    return found


@on_linux
def test_pages_of_blocks_that_nobody_holds_go_back_and_come_again() -> None:
    """What is held says what it said; each layer's head gives back what it had."""
    cache = KVCache(2, 3, 64 * KV_BLOCK, 128, torch.device("cpu"), torch.float16)  # blocks of 4 KiB a head
    blocks = cache.take(64)
    for kept in (cache.keys, cache.values):
        kept.copy_(torch.randn(kept.shape))
    held = [*range(10), 40]
    rows = [block * KV_BLOCK + row for block in held for row in range(KV_BLOCK)]
    before = cache.keys[:, :, rows].clone(), cache.values[:, :, rows].clone()
    cache.give_back([block for block in blocks if block not in held])
    full = _resident(cache)
    assert cache.give_pages_back() == 64 - len(held)
    assert _resident(cache) <= full * len(held) / 64 + 12 * mmap.PAGESIZE
    assert torch.equal(cache.keys[:, :, rows], before[0])
    assert torch.equal(cache.values[:, :, rows], before[1])
    cache.keys[:, :, :] = 2.0
    assert bool((cache.keys == 2.0).all())


@on_linux
def test_pages_are_given_back_once() -> None:
    """Blocks that nobody had since then have no pages; a page that a held block shares stays."""
    cache = KVCache(1, 1, 8 * KV_BLOCK, 4, torch.device("cpu"), torch.float16)  # blocks of 128 B
    assert cache.give_pages_back() == 0
    first, *rest = cache.take(8)
    cache.keys[:] = 3.0
    cache.give_back(rest)
    assert [cache.give_pages_back(), cache.give_pages_back()] == [7, 0]
    assert bool((cache.keys[0, 0, first * KV_BLOCK : (first + 1) * KV_BLOCK] == 3.0).all())


def test_a_system_that_takes_no_single_pages_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(1, 1, 64 * KV_BLOCK, 128, torch.device("cpu"), torch.float16)
    cache.give_back(cache.take(64))
    monkeypatch.setattr(mmap, "MADV_REMOVE", 2**20, raising=False)  # which no system knows
    assert cache.can_give_pages_back
    assert cache.give_pages_back() == 0
    assert not cache.can_give_pages_back


def test_memory_of_an_accelerator_does_not_go_back_in_pieces() -> None:
    cache = KVCache(1, 1, 64, 128, torch.device("meta"), torch.float16)
    cache.give_back(cache.take(4))
    assert not cache.can_give_pages_back
    assert cache.give_pages_back() == 0
