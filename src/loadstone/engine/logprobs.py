"""How likely the model held the tokens that it chose, for those who ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer and the natural logarithm of its probability, before any sampling rule.

    `text` is the token decoded by itself, with U+FFFD where it is a part of a character. `top` has the likeliest tokens
    at this place, as many as were asked for, the likeliest first; theirs is empty.
    """

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


def logprob_of(logits: torch.Tensor, token: int, count: int, spell: Callable[[int], str]) -> TokenLogprob:
    """Return what is told of `token`, chosen for `logits` (vocabulary, float32), with the `count` likeliest ones."""
    values = torch.log_softmax(logits, -1)
    most = min(count, len(values))
    likeliest = torch.topk(values, most)
    # In one transfer: float32 holds the number of every token exactly, up to 16 million.
    found = torch.cat((values[token : token + 1], likeliest.values, likeliest.indices.float())).tolist()
    pairs = zip(map(int, found[1 + most :]), found[1 : 1 + most], strict=True)
    top = tuple(TokenLogprob(one, spell(one), value) for one, value in pairs)
    return TokenLogprob(token, spell(token), found[0], top)
