"""The places of the KV cache: taken side by side, never twice, and all given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.model import KVCache

TOKENS = 32


def _cache(tokens: int = TOKENS) -> KVCache:
    return KVCache(1, 1, tokens, 2, torch.device("cpu"), torch.float16)


# A number above 0 asks for so many places, one below gives the oldest, the next … of those that are held back.
@given(st.lists(st.integers(1, TOKENS + 2) | st.integers(-6, -1), max_size=60))
def test_places_are_never_held_twice_and_all_come_back(steps: list[int]) -> None:
    """Whatever is taken and given back in whatever order, no place has two holders and none is lost."""
    cache = _cache()
    held: list[tuple[int, int]] = []
    for step in steps:
        if step > 0:
            first = cache.reserve(step)
            if first is not None:
                held.append((first, step))
        elif held:
            cache.release(*held.pop(-step % len(held)))
        places = [place for first, count in held for place in range(first, first + count)]
        assert len(set(places)) == len(places)
        assert all(0 <= place < TOKENS for place in places)
        assert cache.free_tokens == TOKENS - len(places)
    for one in held:
        cache.release(*one)
    assert cache.reserve(TOKENS) == 0


@given(st.sets(st.integers(0, TOKENS - 1)), st.integers(1, TOKENS))
def test_a_gap_that_is_large_enough_is_found(taken: set[int], count: int) -> None:
    """`reserve` says None only when no run of free places is long enough."""
    cache = _cache()
    for place in range(TOKENS):
        assert cache.reserve(1) == place
    for place in set(range(TOKENS)) - taken:
        cache.release(place, 1)
    gaps = [first for first in range(TOKENS - count + 1) if not taken & set(range(first, first + count))]
    assert cache.reserve(count) == (gaps[0] if gaps else None)


def test_sizes_are_said_before_pages_are_taken() -> None:
    """Layers × kv heads × tokens × head size, twice, in the cache's type."""
    cache = KVCache(3, 2, 100, 8, torch.device("cpu"), torch.float16)
    assert cache.keys.shape == cache.values.shape == (3, 2, 100, 8)
    assert cache.nbytes == 2 * 3 * 2 * 100 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cache_holds_what_is_written(dtype: torch.dtype) -> None:
    """The memory is the tensor's own, of its type, and writable."""
    cache = KVCache(1, 1, 4, 2, torch.device("cpu"), dtype)
    cache.keys[0, 0, 3] = 1.5
    assert cache.keys.dtype == dtype
    assert cache.keys[0, 0].tolist() == [[0, 0]] * 3 + [[1.5, 1.5]]
