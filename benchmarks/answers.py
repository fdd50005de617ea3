"""What every side's model can do once it is open, and what is measured of one answer.

Imports the standard library alone: sides that need an environment of their own are opened there.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

UNREAD_SHARE = 0.1  # of a prompt that may be found in a cache, and still be called read


class WrongAnswer(Exception):
    """An answer that is not what was asked for, so that nothing can be said about its speed."""


@dataclass(frozen=True)
class Answer:
    """One answer: seconds from asking, with the prompt's tokens at hand, to its first and to its last token.

    What a side does not tell is None: the first token's time, and how many tokens of the prompt it found in its cache,
    drafted, and accepted of those drafted.
    """

    prompt_tokens: int
    tokens: int
    first_token_s: float | None
    last_token_s: float
    cached_tokens: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    text: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of decoding: tokens after the first, by the time that they took."""
        if self.first_token_s is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / (self.last_token_s - self.first_token_s)


class Model(Protocol):
    """A model that is open in this process and answers greedily; where it can be told so, it does not end a text."""

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the measured answer of so many tokens to a text."""

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Return the measured answers to texts that are asked at the same time."""

    def read_per_token(self) -> int | None:
        """Return the bytes of weights that one token needs, or None where only the files say it."""


def open_model(kind: str, settings: Mapping[str, Any]) -> Model:
    """Return the model of a side, opened with its settings; `model_KIND.py` beside this says how."""
    model: Model = importlib.import_module(f".model_{kind}", __package__).open_model(settings)
    return model


def checked(answer: Answer, tokens: int, *, is_new: bool = False) -> Answer:
    """Return an answer that has as many tokens as were asked for; raise WrongAnswer for any other.

    With `is_new` its prompt must have been read too, and not found in a cache.
    """
    if answer.tokens != tokens:
        raise WrongAnswer(f"{tokens} tokens were asked for, and {answer.tokens} came: what they took says nothing")
    if is_new and (answer.cached_tokens or 0) > UNREAD_SHARE * answer.prompt_tokens:
        raise WrongAnswer(f"{answer.cached_tokens} of {answer.prompt_tokens} tokens were in the cache before")
    return answer


def total(counts: Iterable[int | None]) -> int | None:
    """Return the sum of counts, or None where a side tells none."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
