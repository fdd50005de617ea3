"""The decoder holds up against transformers on the same random weights, in float32, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from pairs import VARIANTS, Pair

from loadstone.hardware import MemorySettings
from loadstone.quantization.kernels import cpu

TOLERANCE = 1e-4  # of the largest logit; float32 gives a tenth of it
PROMPT = tiny.prompt(100)
BEGINNING = tiny.prompt(30, seed=5)
STEPS = 64
PairOf = Callable[[str], Pair]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave this process without CPU kernels of our own."""
    monkeypatch.setattr(cpu, "_found", [None])


def greedy(sequences: tiny.Sequences, prompt: list[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """Return the tokens of a greedy answer, and the logits that each was chosen by."""
    logits = [sequences.feed(prompt)]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < steps:
        logits.append(sequences.feed(tokens[-1:], len(prompt) + len(tokens) - 1))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.cat(logits)


def test_logits_of_a_prompt_are_those_of_transformers(pair: Pair) -> None:
    found = tiny.Sequences.of(pair.ours).feed(PROMPT, every_token=True)
    assert found.dtype == torch.float32
    assert tiny.difference(found, pair.wanted(PROMPT)) < TOLERANCE


def test_greedy_tokens_over_64_cached_steps_are_those_of_transformers(pair: Pair) -> None:
    tokens, logits = greedy(tiny.Sequences.of(pair.ours), BEGINNING, STEPS)
    # Transformers chooses the same at every place of the whole text, so its own answer is this one.
    wanted = pair.wanted([*BEGINNING, *tokens[:-1]])[-STEPS:]
    assert tokens == wanted.argmax(-1).tolist()
    assert tiny.difference(logits, wanted) < TOLERANCE


def test_greedy_tokens_without_a_cache_are_those_of_transformers(pair: Pair) -> None:
    """Each step reads the whole text anew into an empty cache."""
    text = list(BEGINNING)
    for _ in range(STEPS):
        text.append(int(tiny.Sequences.of(pair.ours).feed(text).argmax()))
    assert text[len(BEGINNING) :] == pair.wanted(text[:-1])[-STEPS:].argmax(-1).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("no_kernels")
def test_without_kernels_of_our_own_logits_and_tokens_are_the_same(variant: str, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    ours = tiny.load(pair.folder)[0]
    found = tiny.Sequences.of(ours).feed(PROMPT, every_token=True)
    assert tiny.difference(found, pair.wanted(PROMPT)) < TOLERANCE
    tokens, logits = greedy(tiny.Sequences.of(ours), BEGINNING, STEPS)
    wanted = pair.wanted([*BEGINNING, *tokens[:-1]])[-STEPS:]
    assert tokens == wanted.argmax(-1).tolist()
    assert tiny.difference(logits, wanted) < TOLERANCE


def test_a_prompt_read_in_chunks_gives_the_logits_of_the_whole(pair: Pair) -> None:
    whole = tiny.Sequences.of(pair.ours).feed(PROMPT, every_token=True)
    sequences, parts, start = tiny.Sequences.of(pair.ours), [], 0
    for length in (1, 7, 32, 1, 33, 26):
        parts.append(sequences.feed(PROMPT[start : start + length], start, every_token=True))
        start += length
    assert start == len(PROMPT)
    assert tiny.difference(torch.cat(parts), whole) < TOLERANCE


def test_sequences_of_different_lengths_in_one_pass_are_as_alone(pair: Pair) -> None:
    prompts = [tiny.prompt(length, seed=length) for length in (5, 61, 1, 24)]
    sequences = tiny.Sequences.of(pair.ours, len(prompts))
    alone = [tiny.Sequences.of(pair.ours).feed(one, every_token=True) for one in prompts]
    together = sequences.together(prompts, [0] * len(prompts), every_token=True)
    assert tiny.difference(together, torch.cat(alone)) < TOLERANCE


def test_answers_made_together_are_as_alone(pair: Pair) -> None:
    """Decode steps of three sequences share each pass, while the prompt of a fourth is read beside them."""
    prompts = [tiny.prompt(length, seed=length) for length in (5, 61, 24)]
    late = tiny.prompt(40, seed=9)
    answers = [greedy(tiny.Sequences.of(pair.ours), one, 11)[0] for one in prompts]
    sequences = tiny.Sequences.of(pair.ours, 4)
    chosen = sequences.together(prompts, [0, 0, 0]).argmax(-1).tolist()
    found = [[token] for token in chosen]
    for step in range(10):
        inputs = [[one[-1]] for one in found] + [late[4 * step : 4 * step + 4]]
        starts = [len(prompt) + step for prompt in prompts] + [4 * step]
        logits = sequences.together(inputs, starts)
        for one, token in zip(found, logits.argmax(-1).tolist(), strict=False):
            one.append(token)
    assert found == answers
    assert tiny.difference(logits[3:], pair.wanted(late)[-1:]) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama-mqa", "mistral-window", "qwen3"])
@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_give_the_same_numbers(variant: str, threads: int, pair_of: PairOf) -> None:
    pair = pair_of(variant)
    wanted = greedy(tiny.Sequences.of(pair.ours), BEGINNING, 8)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = greedy(tiny.Sequences.of(pair.ours), BEGINNING, 8)[1]
    finally:
        torch.set_num_threads(before)
    assert tiny.difference(found, wanted) < 1e-5


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3"])
def test_only_the_last_token_of_each_sequence_has_logits_unless_all_are_asked_for(
    variant: str, pair_of: PairOf
) -> None:
    pair = pair_of(variant)
    prompts = [tiny.prompt(9), tiny.prompt(1), tiny.prompt(30)]
    last = tiny.Sequences.of(pair.ours, 3).together(prompts, [0, 0, 0])
    every = tiny.Sequences.of(pair.ours, 3).together(prompts, [0, 0, 0], every_token=True)
    assert last.shape == (3, tiny.VOCAB)
    assert tiny.difference(last, every[[8, 9, 39]]) < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("with_kernels", [True, False])
def test_what_lies_elsewhere_in_the_cache_is_never_seen(
    variant: str, with_kernels: bool, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places before, behind and around a sequence may hold anything, even NaN."""
    pair = pair_of(variant)
    wanted = greedy(tiny.Sequences.of(pair.ours), BEGINNING, 8)[1]
    if not with_kernels:
        monkeypatch.setattr(cpu, "_found", [None])
    sequences = tiny.Sequences.of(tiny.load(pair.folder)[0], 3)
    sequences.cache.keys.fill_(float("nan"))
    sequences.cache.values.fill_(float("nan"))
    logits = [sequences.feed(BEGINNING, index=1)]
    for step in range(7):
        token = [int(logits[-1].argmax())]
        logits.append(sequences.feed(token, len(BEGINNING) + step, index=1))
    assert tiny.difference(torch.cat(logits), wanted) < TOLERANCE


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_sequence_can_fill_its_context_to_the_last_place(
    with_kernels: bool, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama")
    if not with_kernels:
        monkeypatch.setattr(cpu, "_found", [None])
    context = 48
    ours = tiny.load(pair.folder, context=context)[0]
    text = PROMPT[:context]
    sequences = tiny.Sequences.of(ours, room=context)
    sequences.feed(text[: context - 1])
    found = sequences.feed(text[context - 1 :], context - 1)
    assert tiny.difference(found, pair.wanted(text)[-1:]) < TOLERANCE


@pytest.mark.parametrize("head_size", [16, 48, 80, 128])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_heads_of_other_sizes_are_seen_whole(head_size: int, model_type: str, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, model_type, head_dim=head_size, num_hidden_layers=1)
    sequences = tiny.Sequences.of(tiny.load(folder)[0])
    found = torch.cat([sequences.feed([one], at) for at, one in enumerate(PROMPT[:40])])
    with torch.inference_mode():
        wanted = tiny.reference(folder)(torch.tensor([PROMPT[:40]])).logits[0]
    assert tiny.difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
def test_a_long_text_is_seen_whole_or_through_its_window(model_type: str, cache_dtype: str, tmp_path: Path) -> None:
    window = {"sliding_window": 200} if model_type == "mistral" else {}
    folder = tiny.write(tmp_path, model_type, max_position_embeddings=1024, num_hidden_layers=1, **window)
    ours = tiny.load(folder, context=1024, settings=replace(tiny.SETTINGS, cache_dtype=cache_dtype))[0]
    text = tiny.prompt(1024)
    sequences = tiny.Sequences.of(ours, room=1024)
    for start in range(0, 1000, 250):
        sequences.feed(text[start : start + 250], start)
    found = torch.cat([sequences.feed([text[at]], at) for at in range(1000, 1024)])
    with torch.inference_mode():
        wanted = tiny.reference(folder)(torch.tensor([text])).logits[0, 1000:]
    close = {"float32": TOLERANCE, "float16": 5e-3, "bfloat16": 5e-2}[cache_dtype]
    assert tiny.difference(found, wanted) < close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_16_bit_checkpoint_gives_the_logits_of_its_widened_weights(
    dtype: torch.dtype, model_type: str, tmp_path: Path
) -> None:
    """The weights stay 16 bits wide, and nothing else is rounded."""
    folder = tiny.write(tmp_path, model_type, dtype)
    ours = tiny.load(folder)[0]
    with torch.inference_mode():
        wanted = tiny.reference(folder)(torch.tensor([PROMPT])).logits[0]
    assert ours.head.tensors()["weight"].dtype == dtype
    sequences = tiny.Sequences.of(ours)
    assert tiny.difference(sequences.feed(PROMPT[:90], every_token=True), wanted[:90]) < TOLERANCE
    steps = [sequences.feed([PROMPT[at]], at) for at in range(90, 100)]
    assert tiny.difference(torch.cat(steps), wanted[90:]) < TOLERANCE


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_processor_that_computes_in_16_bits_agrees_loosely(
    dtype: str, strategy: str, with_kernels: bool, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("qwen2")
    wanted = tiny.Sequences.of(tiny.load(pair.folder, strategy=strategy)[0]).feed(PROMPT, every_token=True)
    if not with_kernels:
        monkeypatch.setattr(cpu, "_found", [None])
    settings = MemorySettings(dtype, dtype, 512, 0)
    ours = tiny.load(pair.folder, strategy=strategy, settings=settings)[0]
    sequences = tiny.Sequences.of(ours)
    found = [sequences.feed(PROMPT[:90], every_token=True)]
    found += [sequences.feed([PROMPT[at]], at) for at in range(90, 100)]
    close = torch.nn.functional.cosine_similarity(torch.cat(found), wanted)
    assert close.mean() > 0.99
    assert close[90:].mean() > 0.99


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [("float16", 5e-3), ("bfloat16", 5e-2)])
def test_a_16_bit_cache_changes_little(
    dtype: str, close: float, with_kernels: bool, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama")
    if not with_kernels:
        monkeypatch.setattr(cpu, "_found", [None])
    ours = tiny.load(pair.folder, settings=replace(tiny.SETTINGS, cache_dtype=dtype))[0]
    sequences = tiny.Sequences.of(ours)
    assert sequences.cache.keys.dtype == getattr(torch, dtype)
    found = [sequences.feed(PROMPT[:90], every_token=True)]
    found += [sequences.feed([PROMPT[at]], at) for at in range(90, 100)]
    assert tiny.difference(torch.cat(found), pair.wanted(PROMPT)) < close
