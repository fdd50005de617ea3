"""Static steps, which devices without our attention kernel take: the numbers of the other ways, told in one copy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from pairs import Pair
from test_greedy import PROMPTS, answers, serving
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from loadstone.model import Decoder, static
from loadstone.model.layer import Layer, Product
from loadstone.model.static import StaticStep, StaticSteps
from loadstone.quantization.kernels import cpu
from loadstone.quantization.linear import DenseLinear, Linear

PairOf = Callable[[str], Pair]
KINDS = ["llama", "llama-mqa", "mistral-window", "qwen2", "qwen2-window", "qwen3", "odd-sizes"]
TOLERANCE = 1e-4  # of the largest logit, as in the tests of parity
TEXTS = [tiny.prompt(length, seed=length) for length in (150, 90, 40)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, pair_of: PairOf) -> Callable[[str], Decoder]:
    """Returns decoders as they are where there are no kernels of our own."""

    def load(variant: str) -> Decoder:
        folder = pair_of(variant).folder
        with monkeypatch.context() as context:
            context.setattr(cpu, "_found", [None])
            return tiny.load(folder)[0]

    return load


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and blocks of every static step, in order."""
    seen: list[tuple[int, int]] = []
    run = StaticStep.__call__

    def watched(step: StaticStep, *arguments: Any) -> torch.Tensor:
        seen.append(tuple(step.told.tables.shape))  # type: ignore[arg-type]
        return run(step, *arguments)

    monkeypatch.setattr(StaticStep, "__call__", watched)
    return seen


def without_static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticSteps, "of", lambda *arguments: None)


def read_on(decoder: Decoder, lengths: tuple[int, int, int], *, at: int = 20) -> tuple[torch.Tensor, tiny.Sequences]:
    """Read the beginnings of three texts, then so many of each text's next tokens a step; return all later logits."""
    sequences = tiny.Sequences.of(decoder, 3)
    starts = [at, at + 5, at - 3]
    sequences.together([text[:start] for text, start in zip(TEXTS, starts, strict=True)], [0, 0, 0])
    found: list[list[torch.Tensor]] = [[], [], []]
    while all(start + length <= len(text) for start, length, text in zip(starts, lengths, TEXTS, strict=True)):
        new = [text[start : start + length] for text, start, length in zip(TEXTS, starts, lengths, strict=True)]
        logits = sequences.together(new, starts, every_token=True)
        for part, one in zip(found, logits.split(lengths), strict=True):
            part.append(one)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    return torch.cat([torch.cat(part) for part in found]), sequences


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (16, 5, 2)])
def test_logits_are_those_of_texts_read_whole(
    variant: str, lengths: tuple[int, int, int], plain: Callable[[str], Decoder], pair_of: PairOf,
    taken: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Three sequences of different lengths, one or more tokens of each a step, until one needs more blocks."""
    found, _ = read_on(plain(variant), lengths)
    steps = len(found) // sum(lengths)
    assert len(taken) == steps
    assert {rows for rows, _ in taken} == {4 if sum(lengths) == 3 else 32}  # some rows are left over
    assert len({blocks for _, blocks in taken}) > 1
    parts = []
    for text, start, length in zip(TEXTS, (20, 25, 17), lengths, strict=True):
        parts.append(pair_of(variant).wanted(text[: start + steps * length])[start:])
    assert tiny.difference(found, torch.cat(parts)) < TOLERANCE


@pytest.mark.parametrize("variant", KINDS)
def test_the_cache_is_what_other_ways_write(
    variant: str, plain: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are left over write nowhere else, and what nobody wrote to stays as it was."""
    decoder = plain(variant)
    found, static_way = read_on(decoder, (1, 1, 1))
    without_static(monkeypatch)
    wanted, other_way = read_on(decoder, (1, 1, 1))
    assert tiny.difference(found, wanted) < TOLERANCE
    for name in ("keys", "values"):
        kept, expected = getattr(static_way.cache, name), getattr(other_way.cache, name)
        assert torch.equal(kept == 0, expected == 0)
        assert tiny.difference(kept, expected) < TOLERANCE


def test_a_short_prompt_has_logits_after_its_last_token_only(
    plain: Callable[[str], Decoder], pair_of: PairOf, taken: list[tuple[int, int]]
) -> None:
    texts = [tiny.prompt(9), tiny.prompt(1, seed=2)]
    found = tiny.Sequences.of(plain("llama"), 2).together(texts, [0, 0])
    assert taken == [(16, 1)]
    assert found.shape == (2, tiny.VOCAB)
    assert tiny.difference(found, torch.cat([pair_of("llama").wanted(one)[-1:] for one in texts])) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral-window"])
def test_greedy_tokens_of_an_engine_are_those_with_kernels(
    variant: str, plain: Callable[[str], Decoder], pair_of: PairOf, taken: list[tuple[int, int]]
) -> None:
    """With guesses, known prefixes, and prompts that are read beside answers."""
    texts = []
    for decoder in (pair_of(variant).ours, plain(variant)):
        with serving(decoder, context=256, streams=3, chunk=32) as batcher:
            streams = answers(batcher, PROMPTS * 2, 32)
            assert any(stream.result.usage.cached_tokens for stream in streams)
            texts.append([stream.result.tokens for stream in streams])
        assert bool(taken) == (decoder.attention is None)
    assert texts[0] == texts[1]


def test_few_shapes_are_made(plain: Callable[[str], Decoder], taken: list[tuple[int, int]]) -> None:
    """Whatever the number of sequences and their lengths; what is more than the largest shape goes another way."""
    decoder = plain("llama")
    sequences = tiny.Sequences.of(decoder, 70, room=48)
    for count in (1, 2, 3, 5, 8, 9, 33, 64, 65):
        sequences.together([[7]] * count, [0] * count)
    sequences.together([tiny.prompt(17)], [0])
    assert taken == [(1, 1), (2, 1), (4, 1), (8, 1), (8, 1), (16, 1), (64, 1), (64, 1)]
    steps = decoder.steps[sequences.cache]._static
    assert len(steps._made) == 6


@pytest.mark.parametrize(
    ("steps", "sizes"), [(1, [1, 2, 4, 8, 16, 32]), (4, [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32])]
)
def test_sizes_are_rounded_up_to_a_few(steps: int, sizes: list[int]) -> None:
    found = [static._rounded(number, steps) for number in range(1, 33)]
    assert found == [min(size for size in sizes if size >= number) for number in range(1, 33)]


def test_blocks_end_with_the_context(plain: Callable[[str], Decoder], pair_of: PairOf, taken: list[Any]) -> None:
    pair = pair_of("llama")
    decoder = plain("llama")
    decoder.cosines, decoder.sines = decoder.cosines[:83], decoder.sines[:83]  # as a load with that context has them
    text = tiny.prompt(83)
    sequences = tiny.Sequences.of(decoder, room=83)
    sequences.feed(text[:-1])
    assert tiny.difference(sequences.feed(text[-1:], 82), pair.wanted(text)[-1:]) < TOLERANCE
    assert taken == [(1, 6)]


def test_what_would_take_more_memory_than_was_planned_goes_another_way(
    plain: Callable[[str], Decoder], monkeypatch: pytest.MonkeyPatch, taken: list[Any]
) -> None:
    wanted, _ = read_on(plain("llama"), (1, 1, 1))
    assert max(taken) == (4, 3)
    taken.clear()
    monkeypatch.setattr(static, "most_places", lambda decoder: 4 * 2 * 16)
    found, _ = read_on(plain("llama"), (1, 1, 1))
    assert max(taken) == (4, 2)
    assert tiny.difference(found, wanted) < TOLERANCE


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_cache_that_nobody_holds_gives_its_memory_back(plain: Callable[[str], Decoder]) -> None:
    decoder = plain("llama")
    sequences = tiny.Sequences.of(decoder)
    sequences.feed([5])
    memory = [StorageWeakRef(kept.untyped_storage()) for kept in (sequences.cache.keys, sequences.cache.values)]
    del sequences
    gc.collect()
    assert all(one.expired() for one in memory)


def test_a_decoder_that_is_released_keeps_no_steps(plain: Callable[[str], Decoder]) -> None:
    """Recorded ones would replay on weights that are gone."""
    decoder = plain("llama")
    sequences = tiny.Sequences.of(decoder)
    sequences.feed([5])
    told = StorageWeakRef(next(iter(decoder.steps[sequences.cache]._static._made.values())).told.ids.untyped_storage())
    decoder.release()
    gc.collect()
    assert told.expired()


# -- a device of its own ----------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts the calls that bring tensors from the processor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.brought: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = call(*arguments, **(named or {}))
        here = [one for one in arguments if isinstance(one, torch.Tensor) and one.is_cpu]
        if here and isinstance(result, torch.Tensor) and not result.is_cpu:
            self.brought.append((str(call), here[0].shape))
        return result


def on_meta(decoder: Decoder) -> Decoder:
    """Return the decoder on a device whose tensors hold nothing, so that no work can wait for what they hold."""

    def moved(vector: torch.Tensor | None) -> torch.Tensor | None:
        return None if vector is None else vector.to("meta")

    def linear(weight: Linear) -> Linear:
        return DenseLinear(weight.tensors()["weight"].to("meta"), torch.float32)

    def layer(one: Layer) -> Layer:
        parts = {
            name: Product(linear(part.weight), moved(part.bias)) if isinstance(part, Product) else moved(part)
            for name, part in vars(one).items()
            if name != "window"
        }
        return replace(one, **parts)  # type: ignore[arg-type]

    return replace(
        decoder, embedding=linear(decoder.embedding), layers=[layer(one) for one in decoder.layers],
        norm=moved(decoder.norm), head=linear(decoder.head), cosines=moved(decoder.cosines),
        sines=moved(decoder.sines), device=torch.device("meta"),
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("variant", KINDS)
def test_a_step_brings_one_tensor_to_the_device_and_waits_for_nothing(variant: str, pair_of: PairOf) -> None:
    """Also where only some rows are wanted."""
    decoder = on_meta(pair_of(variant).ours)
    sequences = tiny.Sequences.of(decoder, 3)
    with Copies() as copies:
        logits = sequences.together([[5], [6, 7, 8], [9]], [40, 20, 0])
    assert logits.shape == (3, tiny.VOCAB)
    assert logits.device.type == "meta"
    assert copies.brought == [("aten.copy_.default", torch.Size([8 * (3 + 3)]))]
