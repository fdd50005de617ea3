"""The texts that all sides are asked: one sentence, repeated until it has enough tokens, and a passage to be quoted."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product

SENTENCE = "What moves the price of a share: earnings, interest rates, or what others expect of both? "

Encode = Callable[[str], Sequence[int]]


def prompt_of(tokens: int, count: Callable[[str], int], opening: str = "") -> str:
    """Return a text of at least `tokens` tokens, and not many more; `count` says how many a text has.

    `opening` is what it begins with.
    """
    words = SENTENCE.split(" ")[:-1]
    each = count(SENTENCE * 8) / (8 * len(words))
    wanted = int(tokens / each)
    while True:
        text = opening + " ".join(words[index % len(words)] for index in range(wanted))
        if count(text) >= tokens:
            return text
        wanted += 1


def different_prompts(number: int, tokens: int, encode: Encode, *, but: Sequence[str] = ()) -> list[str]:
    """Return texts of about `tokens` tokens that differ from each other, and from those of `but`, in the first token.

    What has been read of one is then of no use for another, wherever prompts are remembered.
    """
    taken = {encode(text)[0] for text in but}
    found: list[str] = []
    for opening in _openings():
        if len(found) == number:
            return found
        text = prompt_of(tokens, lambda text: len(encode(text)), opening)
        first = encode(text)[0]
        if first not in taken:
            taken.add(first)
            found.append(text)
    raise ValueError(f"only {len(found)} of {number} prompts could be told apart by their first token")


def prompts_with_one_beginning(number: int, shared: int, own: int, encode: Encode, *, but: Sequence[str]) -> list[str]:
    """Return texts with the same first `shared` tokens or so, and after them about `own` tokens that differ."""
    (beginning,) = different_prompts(1, shared, encode, but=but)
    return [f"{beginning} {ending}" for ending in different_prompts(number, own, encode)]


def _openings() -> Iterator[str]:
    letters = string.ascii_letters
    return (f"{''.join(one)} " for one in chain(letters, product(letters, repeat=2)))
