"""The texts that both sides are asked: one sentence, repeated until it has enough tokens."""

from __future__ import annotations

from collections.abc import Callable

SENTENCE = "What moves the price of a share: earnings, interest rates, or what others expect of both? "


def prompt_of(tokens: int, count: Callable[[str], int]) -> str:
    """Return a text of at least `tokens` tokens, and not many more; `count` says how many a text has."""
    words = SENTENCE.split(" ")[:-1]
    each = count(SENTENCE * 8) / (8 * len(words))
    wanted = int(tokens / each)
    while True:
        text = " ".join(words[index % len(words)] for index in range(wanted))
        if count(text) >= tokens:
            return text
        wanted += 1
