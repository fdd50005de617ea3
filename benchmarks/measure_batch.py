"""Opens one side's model in this fresh process, asks it many prompts at once, and prints the figures as one JSON line.

Imports the standard library alone before the model is opened: some sides run in an environment of their own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from .answers import Answer, Model, checked, open_model, total
from .process_memory import memory_now

WARM_UP_TOKENS = 4


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the figures; `task` has kind, settings, tokens, and three lists of prompts: `rounds`.

    The first round warms up, of the second one token is asked, and of the third all of them, so that what the tokens
    after the first took is the difference.
    """
    model = open_model(task["kind"], task["settings"])
    warm_up, short, whole = task["rounds"]
    _ask(model, warm_up, WARM_UP_TOKENS)
    _, prompts_s = _ask(model, short, 1)
    answers, whole_s = _ask(model, whole, task["tokens"])
    return {**figures_of(answers, prompts_s, whole_s), **memory_now()}


def _ask(model: Model, prompts: Sequence[str], tokens: int) -> tuple[list[Answer], float]:
    """Return the answers to prompts that are asked together, and the seconds that all of them took."""
    started = time.perf_counter()
    answers = model.ask_together(prompts, tokens)
    took = time.perf_counter() - started
    return [checked(answer, tokens, is_new=True) for answer in answers], took


def figures_of(answers: Sequence[Answer], prompts_s: float, whole_s: float) -> dict[str, Any]:
    """Return what seconds mean: those of as many prompts with one token each, and those of these whole answers."""
    made, read = sum(one.tokens for one in answers), sum(one.prompt_tokens for one in answers)
    firsts = [one.first_token_s for one in answers if one.first_token_s is not None]
    decode_s = whole_s - prompts_s
    return {
        "streams": len(answers),
        "prompt_tokens": read,
        "tokens": made,
        "prompts_s": prompts_s,
        "whole_s": whole_s,
        "decode_tokens_per_s": (made - len(answers)) / decode_s if decode_s > 0 else None,
        "answer_tokens_per_s": made / whole_s,
        "all_tokens_per_s": (made + read) / whole_s,
        "first_token_s": statistics.median(firsts) if firsts else None,
        "worst_first_token_s": max(firsts, default=None),
        "drafted_tokens": total(one.drafted_tokens for one in answers),
        "accepted_tokens": total(one.accepted_tokens for one in answers),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
