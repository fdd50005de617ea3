"""Opens one side's model in this fresh process, asks it for one case, and prints the figures as one JSON line.

Imports the standard library alone before the model is opened: some sides run in an environment of their own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from .answers import Answer, Model, checked, open_model, total
from .process_memory import memory_now

WARM_UP_TOKENS = 4
ENOUGH_S = 5.0  # of asking; what takes longer is asked once


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one case; `task` has kind, settings, warm_up, prompts and tokens.

    And it says what prompts have in common: `has_one_beginning` of two, `are_new` where it is nothing.
    """
    model = open_model(task["kind"], task["settings"])
    checked(model.ask(task["warm_up"], WARM_UP_TOKENS), WARM_UP_TOKENS)
    if task["has_one_beginning"]:
        figures = _with_one_beginning(model, task["prompts"], task["tokens"])
    else:
        figures = _one_by_one(model, task["prompts"], task["tokens"], are_new=task["are_new"])
    return {**figures, "read_per_token_bytes": model.read_per_token(), **memory_now()}


def _with_one_beginning(model: Model, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Ask two prompts that begin with the same text."""
    first, again = (checked(model.ask(prompt, tokens), tokens) for prompt in prompts)
    return {
        "prompt_tokens": again.prompt_tokens,
        "first_token_s": first.first_token_s,
        "again_first_token_s": again.first_token_s,
        "cached_tokens": again.cached_tokens,
    }


def _one_by_one(model: Model, prompts: Sequence[str], tokens: int, *, are_new: bool) -> dict[str, Any]:
    """Ask prompts until enough time went by; return the medians. Those that `are_new` must not be in a cache."""
    answers: list[Answer] = []
    started = time.perf_counter()
    for prompt in prompts:
        answers.append(checked(model.ask(prompt, tokens), tokens, is_new=are_new))
        if time.perf_counter() - started > ENOUGH_S:
            break
    return {
        "asked": len(answers),
        "tokens": tokens,
        "prompt_tokens": _median(answers, lambda one: one.prompt_tokens),
        "first_token_s": _median(answers, lambda one: one.first_token_s),
        "prefill_tokens_per_s": _median(
            answers, lambda one: one.prompt_tokens / one.first_token_s if one.first_token_s else None
        ),
        "decode_tokens_per_s": _median(answers, lambda one: one.tokens_per_s),
        "drafted_tokens": total(one.drafted_tokens for one in answers),
        "accepted_tokens": total(one.accepted_tokens for one in answers),
        "texts": [one.text for one in answers],
    }


def _median(answers: Sequence[Answer], figure: Callable[[Answer], float | None]) -> float | None:
    known = [value for value in map(figure, answers) if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
