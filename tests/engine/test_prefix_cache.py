"""What the KV cache remembers is what was said there, whoever shares it, and its blocks are never lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.engine.prefix_cache import Places, PrefixCache
from loadstone.model import KVCache
from loadstone.quantization.kernels.words import KV_BLOCK

BLOCKS = 8


class Text:
    """A sequence in a cache whose keys are its tokens: what the decoder would write there."""

    def __init__(self, cache: KVCache, places: Places, prompt: Sequence[int], more: Sequence[int]) -> None:
        self.cache, self.places = cache, places
        self.prompt, self.tokens = list(prompt), [*prompt, *more]

    @property
    def said(self) -> list[int]:
        """What the cache says at this sequence's places."""
        rows = self.cache.keys[0, 0, :, 0].view(-1, KV_BLOCK)[self.places.block_table].flatten()
        return [int(value) for value in rows[: len(self.tokens)]]

    def write(self, start: int, stop: int) -> None:
        for position in range(start, min(stop, len(self.tokens))):
            place = int(self.places.block_table[position // KV_BLOCK]) * KV_BLOCK + position % KV_BLOCK
            self.cache.keys[0, 0, place, 0] = self.tokens[position]


def _cache() -> KVCache:
    return KVCache(1, 1, BLOCKS * KV_BLOCK, 1, torch.device("cpu"), torch.float32)


def _begin(prefixes: PrefixCache, cache: KVCache, prompt: Sequence[int], more: Sequence[int] = ()) -> Text | None:
    places = prefixes.begin(prompt, len(prompt) + len(more))
    return None if places is None else Text(cache, places, prompt, more)


def _say(prefixes: PrefixCache, cache: KVCache, prompt: Sequence[int], more: Sequence[int] = ()) -> int:
    """Read and answer a prompt from beginning to end; return how many of its tokens were known."""
    text = _begin(prefixes, cache, prompt, more)
    assert text is not None
    text.write(text.places.known, len(text.tokens))
    assert text.said == text.tokens
    prefixes.end(text.places, text.tokens)
    return text.places.known


def _numbers(count: int, first: int = 1) -> list[int]:
    return [*range(first, first + count)]


def test_what_was_read_is_known_but_for_the_last_token() -> None:
    """Asked again, a prompt has one token left to read: what follows it is not remembered."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    assert _say(prefixes, cache, _numbers(40)) == 0
    assert _say(prefixes, cache, _numbers(40)) == 39


def test_the_next_turn_knows_the_answer_too() -> None:
    """A conversation goes on where the answer ended, to the token."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(20), _numbers(9, 100))
    assert _say(prefixes, cache, [*_numbers(20), *_numbers(9, 100), 7, 8]) == 29


def test_texts_part_in_the_middle_of_a_block() -> None:
    """What two prompts have in common counts token by token, and neither spoils the other."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(30))
    assert _say(prefixes, cache, [*_numbers(21), 200, 201]) == 21
    assert _say(prefixes, cache, _numbers(30)) == 29


def test_two_under_way_share_blocks() -> None:
    """As soon as a prompt is read, another one that begins alike holds the same blocks."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    first = _begin(prefixes, cache, _numbers(40))
    assert first is not None
    first.write(0, 40)
    prefixes.share(first.places, first.prompt)
    second = _begin(prefixes, cache, [*_numbers(40), 5, 6])
    assert second is not None
    assert second.places.known == 32  # the third block is not whole, and still the first one's own
    assert torch.equal(second.places.block_table[:2], first.places.block_table[:2])
    assert prefixes.free_blocks == BLOCKS - 4


def test_the_longest_unused_goes_first() -> None:
    """When there is no more room, what was used last stays."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    for first in (100, 200, 300):
        _say(prefixes, cache, _numbers(33, first))  # three blocks, of which one has one token
    assert _say(prefixes, cache, _numbers(33, 200)) == 32
    assert _say(prefixes, cache, _numbers(33, 300)) == 32
    assert _say(prefixes, cache, _numbers(33, 100)) < 32


def test_nothing_is_remembered_when_it_is_off() -> None:
    """Every block is free again after each text."""
    cache = _cache()
    prefixes = PrefixCache(cache, is_on=False)
    for _ in range(2):
        assert _say(prefixes, cache, _numbers(40)) == 0
        assert cache.free_blocks == BLOCKS


def test_clearing_gives_every_block_back() -> None:
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(100))
    assert cache.free_blocks < BLOCKS
    prefixes.clear()
    assert cache.free_blocks == BLOCKS
    assert [*prefixes.nodes()] == []


@dataclass(frozen=True)
class Move:
    """Begin a text when there is a prompt; else read on, or end, one of those under way."""

    prompt: tuple[int, ...]
    more: int
    which: int
    is_end: bool


# Texts of few different tokens, repeated, so that many begin alike and part anywhere.
_PROMPTS = st.lists(st.sampled_from([(1,) * 9, (2,) * 7, (1, 2, 3), (3,) * 16]), min_size=1, max_size=6).map(
    lambda parts: tuple(token for part in parts for token in part)
)
_MOVES = st.builds(Move, st.just(()) | _PROMPTS, st.integers(0, 20), st.integers(0, 5), st.booleans())


@settings(max_examples=200)
@given(st.lists(_MOVES, max_size=40))
def test_whatever_comes_and_goes_every_text_reads_what_it_wrote(moves: list[Move]) -> None:
    """However texts begin, are read, ended and forgotten: what is known is right, nobody overwrites another, and each
    block is free, remembered or held."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    running: list[tuple[Text, int]] = []
    for move in moves:
        if move.prompt:
            text = _begin(prefixes, cache, move.prompt, [4] * move.more)
            if text is not None:
                assert text.places.known < len(move.prompt)
                assert text.said[: text.places.known] == text.tokens[: text.places.known]
                running.append((text, text.places.known))
        elif running:
            text, done = running.pop(move.which % len(running))
            if move.is_end:  # cut short, perhaps: what it has in its places is remembered all the same
                prefixes.end(text.places, text.tokens[:done])
            else:
                text.write(done, len(text.prompt))
                prefixes.share(text.places, text.prompt)
                text.write(len(text.prompt), len(text.tokens))
                running.append((text, len(text.tokens)))
        for one, done in running:
            assert one.said[:done] == one.tokens[:done]
        held = {int(block) for one, _ in running for block in one.places.block_table}
        assert prefixes.free_blocks == BLOCKS - len(held)
    for text, done in running:
        prefixes.end(text.places, text.tokens[:done])
    assert prefixes.free_blocks == BLOCKS
    prefixes.clear()
    assert cache.free_blocks == BLOCKS
