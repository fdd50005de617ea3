"""The cases of `benchmarks.decode`: which prompts are asked, and how many tokens are wanted of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .passages import FREE, GROUNDED
from .prompts import different_prompts, prompts_with_one_beginning

TRIES = 3  # prompts of one process, where they are short
DECODED = 32  # tokens after the first
CONTEXT_STEP = 256  # a context is a multiple of it


@dataclass(frozen=True)
class Case:
    """One kind of request: prompts of `prompt_tokens`, of which the first `shared_tokens` are the same.

    Answers have `tokens`. A long case is measured in the first turn only.
    """

    name: str
    prompt_tokens: int
    tokens: int
    shared_tokens: int = 0
    is_long: bool = False


CASES = {
    "40": Case("40 tokens", 40, 1 + DECODED),
    "480": Case("480 tokens", 480, 1),
    "prefix": Case("shared prefix", 1030, 1, shared_tokens=1000),
    "4000": Case("4000 tokens", 4000, 1 + DECODED, is_long=True),
}
TEXT_CASES = {"grounded": Case("grounded text", 0, 65), "free": Case("free text", 0, 65)}
TEXT_CONTEXT = 1024


@dataclass(frozen=True)
class Asked:
    """A case's prompts, and the context that the longest of them and its answer need, in tokens.

    Prompts of a chat begin with what its template says, so that they have something in common.
    """

    prompts: Sequence[str]
    context: int
    is_chat: bool = False


def asked_of(case: Case, tokenizer_file: Path, warm_up: str) -> Asked:
    """Return what is asked in a case; no prompt begins like another, or like the one that warms up."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    if case.shared_tokens:
        own = case.prompt_tokens - case.shared_tokens
        prompts = prompts_with_one_beginning(2, case.shared_tokens, own, encode, but=[warm_up])
    else:
        prompts = different_prompts(TRIES, case.prompt_tokens, encode, but=[warm_up])
    needed = max(len(encode(prompt)) for prompt in prompts) + case.tokens
    return Asked(prompts, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)


def asked_of_text(case: Case) -> Asked:
    """Return what is asked in a case of real text, as messages of a chat."""
    return Asked(GROUNDED if case == TEXT_CASES["grounded"] else FREE, TEXT_CONTEXT, is_chat=True)
