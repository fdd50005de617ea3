"""Served together, in chunks, with known prefixes and guesses, greedy tokens are those of transformers (float32)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from pairs import Pair

from loadstone.config import EngineConfig, Sampling
from loadstone.engine.batcher import Batcher
from loadstone.engine.request import Request, Stream
from loadstone.model import Decoder

STEPS = 48
SHARED = tiny.prompt(50, seed=1)
# Some begin alike, one repeats itself, and one is read in many chunks.
PROMPTS = [
    [*SHARED, *tiny.prompt(9, seed=2)],
    [*SHARED, *tiny.prompt(30, seed=3)],
    tiny.prompt(7, seed=4) * 6,
    tiny.prompt(120, seed=5),
    SHARED,
]


class NoText:
    """Tokens of a random model spell nothing."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@contextmanager
def serving(decoder: Decoder, *, context: int, streams: int, chunk: int) -> Iterator[Batcher]:
    batcher = Batcher(
        decoder, context=context, cache_tokens=context * streams, chunk=chunk, ends=(), spell=str,
        new_text=NoText, wish=EngineConfig(),  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        yield batcher
    finally:
        batcher.close()


def answers(batcher: Batcher, prompts: list[list[int]], steps: int) -> list[Stream]:
    """Ask all at once, and return when all are answered."""
    streams = []
    for prompt in prompts:
        request = Request(prompt, Sampling(max_new_tokens=steps))
        batcher.submit(request)
        streams.append(Stream(request))
    for stream in streams:
        for _ in stream:
            pass
    return streams


def test_greedy_tokens_are_those_of_transformers(pair: Pair) -> None:
    with serving(pair.ours, context=256, streams=3, chunk=32) as batcher:
        # All of them twice: the second time most of each is known.
        for stream, prompt in zip(answers(batcher, PROMPTS * 2, STEPS), PROMPTS * 2, strict=True):
            tokens = [*stream.result.tokens]
            assert len(tokens) == STEPS
            # transformers chooses the same at every place of the whole text, so its own answer is this one.
            assert tokens == pair.wanted([*prompt, *tokens[:-1]])[-STEPS:].argmax(-1).tolist()
        assert batcher.prefixes.free_blocks == batcher.cache.blocks


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 94])
def test_a_prompt_that_is_known_is_answered_alike_wherever_its_blocks_end(
    length: int, pair_of: Callable[[str], Pair]
) -> None:
    """All but its last token is known, also in a context that is not a whole number of blocks."""
    pair, prompt = pair_of("llama"), tiny.prompt(length, seed=6)
    with serving(pair.ours, context=95, streams=2, chunk=32) as batcher:
        first, second = (answers(batcher, [prompt], STEPS)[0].result for _ in range(2))
    assert second.usage.cached_tokens == length - 1
    assert first.tokens == second.tokens
    assert len(first.tokens) == min(STEPS, 95 - length)
    assert [*first.tokens] == pair.wanted([*prompt, *first.tokens[:-1]])[length - 1 :].argmax(-1).tolist()


def test_eight_thousand_tokens_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """A long prompt in chunks of 512, then a few tokens, then the same prompt again, known."""
    length = 8100
    folder = tiny.write(tmp_path, "qwen2", max_position_embeddings=8192, num_hidden_layers=2)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompt = tiny.prompt(length, seed=8)
    with serving(tiny.load(folder, context=8192)[0], context=8192, streams=1, chunk=512) as batcher:
        first, second = (answers(batcher, [prompt], 8)[0].result for _ in range(2))
    assert second.usage.cached_tokens == length - 1
    assert first.tokens == second.tokens
    with torch.inference_mode():
        logits = theirs(torch.tensor([[*prompt, *first.tokens[:-1]]]), logits_to_keep=8).logits[0]
    assert [*first.tokens] == logits.argmax(-1).tolist()
