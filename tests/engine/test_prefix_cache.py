"""What the KV cache remembers is what was said there, whoever shares it, and its blocks are never lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.engine.prefix_cache import Node, Places, PrefixCache
from loadstone.model import KVCache
from loadstone.quantization.kernels.words import KV_BLOCK

BLOCKS = 8


class Text:
    """A sequence in a cache whose keys are its tokens: what the decoder would write there."""

    def __init__(
        self, prefixes: PrefixCache, cache: KVCache, places: Places, prompt: Sequence[int], more: Sequence[int]
    ) -> None:
        self.prefixes, self.cache, self.places = prefixes, cache, places
        self.prompt, self.tokens = list(prompt), [*prompt, *more]

    @property
    def said(self) -> list[int]:
        """What the cache says at this sequence's places, as far as it has them."""
        rows = self.cache.keys[0, 0, :, 0].view(-1, KV_BLOCK)[self.places.block_table].flatten()
        return [int(value) for value in rows[: len(self.tokens)]]

    def write(self, start: int, stop: int) -> None:
        self.prefixes.reach(self.places, min(stop, len(self.tokens)))
        for position in range(start, min(stop, len(self.tokens))):
            place = int(self.places.block_table[position // KV_BLOCK]) * KV_BLOCK + position % KV_BLOCK
            self.cache.keys[0, 0, place, 0] = self.tokens[position]


def _cache() -> KVCache:
    """A cache whose blocks are 4 KiB of keys, as large as a page of most systems."""
    return KVCache(1, 1, BLOCKS * KV_BLOCK, 64, torch.device("cpu"), torch.float32)


def _begin(prefixes: PrefixCache, cache: KVCache, prompt: Sequence[int], more: Sequence[int] = ()) -> Text | None:
    places = prefixes.begin(prompt, len(prompt) + len(more))
    return None if places is None else Text(prefixes, cache, places, prompt, more)


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


def test_what_is_promised_is_taken_from_the_others_as_it_is_needed() -> None:
    """A text that may become long takes nothing from those that are remembered before it is long."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(33, 100))
    text = _begin(prefixes, cache, _numbers(4), [4] * (BLOCKS * KV_BLOCK - 4))
    assert text is not None
    assert prefixes.known(_numbers(33, 100)) == 32
    for length in (4, 5 * KV_BLOCK, 7 * KV_BLOCK):
        text.write(0, length)
    assert prefixes.known(_numbers(33, 100)) == 16
    text.write(0, BLOCKS * KV_BLOCK)
    assert prefixes.known(_numbers(33, 100)) == 0
    with pytest.raises(ValueError, match="promised"):
        prefixes.reach(text.places, BLOCKS * KV_BLOCK + 1)


def test_what_is_promised_to_one_is_not_promised_to_another() -> None:
    """Even while nobody has it; and who ends early makes room."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(33, 100))
    text = _begin(prefixes, cache, _numbers(4), [4] * 6 * KV_BLOCK)
    assert text is not None
    assert (prefixes.promised_blocks, prefixes.free_blocks) == (6, BLOCKS - 1)
    assert _begin(prefixes, cache, [7], [4] * KV_BLOCK) is None
    assert _begin(prefixes, cache, _numbers(33, 100)) is None  # what it knows would not be there for the first
    prefixes.end(text.places, text.tokens[:4])
    assert prefixes.promised_blocks == 0
    assert _begin(prefixes, cache, _numbers(33, 100)) is not None


def test_making_room_costs_no_more_when_more_is_remembered() -> None:
    """As many calls where a thousand blocks are remembered as where ten are, of texts that begin alike or not."""

    def calls(blocks: int, *beginning: int) -> int:
        cache = KVCache(1, 1, blocks * KV_BLOCK, 1, torch.device("cpu"), torch.float32)
        prefixes = PrefixCache(cache)
        for number in range(10, blocks + 20):
            prefixes.end(_begun(prefixes, [*beginning, number]), [*beginning, number])
        assert cache.free_blocks == 0
        seen: list[str] = []
        sys.setprofile(lambda frame, event, argument: seen.append(event))
        places = _begun(prefixes, [*beginning, 5])
        prefixes.end(places, [*beginning, 5])
        sys.setprofile(None)
        return len(seen)

    for beginning in ([], [1], [*range(KV_BLOCK)]):
        assert calls(10, *beginning) == calls(1000, *beginning)


def _begun(prefixes: PrefixCache, prompt: Sequence[int]) -> Places:
    places = prefixes.begin(prompt, len(prompt))
    assert places is not None
    return places


def test_what_is_forgotten_is_read_again_and_its_blocks_are_free() -> None:
    """A sequence under way keeps what it shares."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    _say(prefixes, cache, _numbers(3 * KV_BLOCK))
    text = _begin(prefixes, cache, _numbers(KV_BLOCK + 1))
    assert text is not None
    assert prefixes.forget() == 2 * KV_BLOCK
    assert cache.free_blocks == BLOCKS - 2
    text.write(text.places.known, len(text.tokens))
    assert text.said == text.tokens
    prefixes.end(text.places, text.tokens)
    assert prefixes.forget() == KV_BLOCK + 1
    assert cache.free_blocks == BLOCKS
    assert _say(prefixes, cache, _numbers(3 * KV_BLOCK)) == 0


@dataclass(frozen=True)
class Move:
    """Begin a text when there is a prompt; else read on, or end, one of those under way. Before, perhaps, forget."""

    prompt: tuple[int, ...]
    more: int
    which: int
    is_end: bool
    forgets: bool


# Texts of few different tokens, repeated, so that many begin alike and part anywhere.
_PROMPTS = st.lists(st.sampled_from([(1,) * 9, (2,) * 7, (1, 2, 3), (3,) * 16]), min_size=1, max_size=6).map(
    lambda parts: tuple(token for part in parts for token in part)
)
_RARELY = st.sampled_from([False] * 7 + [True])
_MOVES = st.builds(Move, st.just(()) | _PROMPTS, st.integers(0, 20), st.integers(0, 5), st.booleans(), _RARELY)


@settings(max_examples=200)
@given(st.lists(_MOVES, max_size=40))
def test_whatever_comes_and_goes_every_text_reads_what_it_wrote(moves: list[Move]) -> None:
    """However texts begin, are read, ended and forgotten: what is known is right, nobody overwrites another, and each
    block is free, remembered or held."""
    cache = _cache()
    prefixes = PrefixCache(cache)
    running: list[tuple[Text, int]] = []
    for move in moves:
        if move.forgets:
            prefixes.forget()
            cache.give_pages_back()
            assert [*prefixes.nodes()] == []
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
        assert prefixes.promised_blocks == sum(one.places.promised for one, _ in running) <= prefixes.free_blocks
        _check_order(prefixes)
    for text, done in running:
        prefixes.end(text.places, text.tokens[:done])
    assert prefixes.free_blocks == BLOCKS
    text = _begin(prefixes, cache, [9], [9] * (BLOCKS * KV_BLOCK - 1))
    assert text is not None
    prefixes.reach(text.places, BLOCKS * KV_BLOCK)
    assert sorted(text.places.block_table.tolist()) == [*range(BLOCKS)]
    assert [*prefixes.nodes()] == []


def _check_order(prefixes: PrefixCache) -> None:
    """Parents are used as late as their children, or held; and children are in order, so that they are found."""
    seen: set[Node | None] = {prefixes._root}
    for node in prefixes.nodes():
        assert node.parent is not None
        assert node.references == 0
        assert node.parent in seen or node.parent.references > 0
        assert node in node.parent.children
        said = [one.tokens for one in node.parent.children]
        assert said == sorted(set(said))
        seen.add(node)
