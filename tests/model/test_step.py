"""The recorded steps of a decoder: whose memory they use, and how long they keep it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from pairs import Pair
from torch.multiprocessing.reductions import StorageWeakRef

from loadstone.model.step import Step
from loadstone.quantization.kernels import cpu

PairOf = Callable[[str], Pair]
TOKENS = tiny.prompt(100)

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="without kernels nothing is recorded")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that is recorded, in order."""
    made: list[Step] = []
    record = Step.__init__

    def recording(step: Step, *arguments: Any) -> None:
        record(step, *arguments)
        made.append(step)

    monkeypatch.setattr(Step, "__init__", recording)
    return made


def decoded(sequences: tiny.Sequences, count: int) -> torch.Tensor:
    """Return the logits after each of the first tokens, read one at a time."""
    return torch.cat([sequences.feed([token], place) for place, token in enumerate(TOKENS[:count])])


def test_a_cache_that_nobody_holds_gives_its_memory_back(pair_of: PairOf) -> None:
    sequences = tiny.Sequences.of(pair_of("llama").ours)
    decoded(sequences, 2)
    memory = [StorageWeakRef(kept.untyped_storage()) for kept in (sequences.cache.keys, sequences.cache.values)]
    del sequences
    gc.collect()
    assert all(one.expired() for one in memory)


def test_two_threads_may_decode_with_one_decoder_and_a_cache_each(pair_of: PairOf) -> None:
    """What lies between the products is not shared: each gets the numbers that it gets alone."""
    ours = pair_of("llama").ours
    wanted = decoded(tiny.Sequences.of(ours), 80)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: decoded(tiny.Sequences.of(ours), 80), range(6)):
            assert torch.equal(found, wanted)


def test_a_step_is_recorded_once(pair_of: PairOf, recorded: list[Step]) -> None:
    """However often its number of tokens changes, also to one that is too many for the kernels."""
    sequences = tiny.Sequences.of(pair_of("llama").ours, 30, room=16)
    for count in (8, 3, 30, 8, 3, 30, 8, 1):
        sequences.together([[token] for token in TOKENS[:count]], [0] * count)
    assert [len(step.tokens) for step in recorded] == [8, 3, 1]


def test_steps_of_any_number_of_tokens_use_the_same_scratch_space(pair_of: PairOf, recorded: list[Step]) -> None:
    """Scores for a whole context and every thread are large, and only one step runs at a time."""
    sequences = tiny.Sequences.of(pair_of("llama").ours, 4)
    for count in (4, 3, 2, 1):
        sequences.together([[token] for token in TOKENS[:count]], [0] * count)
    assert len(recorded) == 4
    assert len({step.tokens.scratch.data_ptr() for step in recorded}) == 1
