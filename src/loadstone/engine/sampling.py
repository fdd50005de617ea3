"""Logits → the next token, by the rules that are in force for one request.

The order is the field's usual one: what a grammar allows, penalties, temperature, top-k, top-p, min-p, then a draw. All
of it but the grammar is done where the logits are, and a token takes one transfer from there. Knows logits and tokens
seen so far; nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loadstone.config import Sampling
from loadstone.errors import GenerationError

from ._llguidance import Grammar

CANDIDATES = 1024  # what top-p looks at first; all are sorted only when these do not reach p
SPOILT = -1  # instead of a token, where logits hold NaN
UNREACHED = -2  # instead of a token, where the candidates do not reach p


class Sampler:
    """Chooses the tokens of one answer; the same seed chooses the same tokens from the same logits.

    With a `grammar` only what it allows is chosen, and it goes on with each token.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        self.sampling = sampling
        self._grammar = grammar
        self._penalties = Penalties(sampling, prompt) if _has_penalties(sampling) else None
        self._generator = torch.Generator()
        self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()

    @property
    def takes_largest(self) -> bool:
        """Whether the token with the largest logit is chosen, whatever came before."""
        return self.sampling.greedy and self._penalties is None and self._grammar is None

    @property
    def is_over(self) -> bool:
        """Whether no token may follow what was chosen so far."""
        return self._grammar is not None and self._grammar.is_over

    def choose(self, logits: torch.Tensor, largest: int | None = None) -> int:
        """Return the next token for `logits` (vocabulary, float32), and remember it.

        `largest` is what `largest_tokens` says of them; where it is not given and needed, it is found.
        Raises GenerationError when the logits hold NaN: the weights, or an overflow, have spoilt them.
        """
        if self._grammar is not None:
            logits = self._grammar.allow(logits)
        if self._penalties is not None:
            logits = self._penalties.apply(logits)
        if not self.sampling.greedy:
            token = self._draw(logits)
        elif largest is None or not self.takes_largest:
            (token,) = largest_tokens(logits.unsqueeze(0))
        else:
            token = largest
        if token == SPOILT:
            raise GenerationError(
                "The model's logits hold NaN, so no token can be chosen.",
                hint="The checkpoint may be damaged, or a weight overflows at this quantization: try another.",
            )
        if self._penalties is not None:
            self._penalties.note(token)
        if self._grammar is not None:
            self._grammar.take(token)
        return token

    def _draw(self, logits: torch.Tensor) -> int:
        # One draw and a search; torch.multinomial draws once for every token, which takes 5 ms for 150,000.
        point = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        token = self._token_at(point, logits, CANDIDATES)
        return token if token != UNREACHED else self._token_at(point, logits, len(logits))

    def _token_at(self, point: float, logits: torch.Tensor, candidates: int) -> int:
        """Return the token at `point` of the whole probability, from 0 to 1, or UNREACHED or SPOILT."""
        probabilities, tokens, is_reached = self.distribution(logits, candidates)
        kind = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS has not
        reached = probabilities.cumsum(-1, dtype=kind)
        place = torch.searchsorted(reached, reached[-1:] * point, right=True).clamp_(max=len(tokens) - 1)
        token = tokens.gather(0, place).where(is_reached, UNREACHED)
        return int(token.where(~reached[-1:].isnan(), SPOILT))

    def distribution(self, logits: torch.Tensor, candidates: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the probabilities of what may be chosen, its tokens, and whether this is all, for penalised logits.

        It may not be all when top-p looks at no more than so many `candidates`. The temperature is above 0. Tokens that
        a rule drops are not there, or have the probability 0.
        """
        rules = self.sampling
        values = logits / rules.temperature
        tokens = torch.arange(len(values), device=values.device)
        is_reached = torch.ones(1, dtype=torch.bool, device=values.device)
        if 0 < rules.top_k < len(values):
            values, tokens = torch.topk(values, rules.top_k)
        probabilities = (values - torch.logsumexp(values, -1)).exp()
        if rules.top_p < 1.0:
            if len(probabilities) > candidates:
                probabilities, places = torch.topk(probabilities, candidates)
                is_reached = probabilities.sum(-1, keepdim=True) >= rules.top_p
            else:
                probabilities, places = torch.sort(probabilities, descending=True)
            tokens = tokens[places]
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < rules.top_p, 0.0)
        if rules.min_p > 0.0:
            probabilities = probabilities.where(probabilities >= rules.min_p * probabilities.max(), 0.0)
        return probabilities / probabilities.sum(), tokens, is_reached


class Penalties:
    """What repetition, presence and frequency cost a token, by the prompt and by the answer so far.

    What was said is kept where the logits are, one number for every token of the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._rules = sampling
        self._prompt = sorted(set(prompt))
        self._is_known: torch.Tensor | None = None  # whether the prompt or the answer has it
        self._counts: torch.Tensor | None = None  # how often the answer has it

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (vocabulary, float32) after all penalties; those given stay as they are."""
        rules = self._rules
        if self._is_known is None or self._counts is None:
            self._counts = torch.zeros_like(logits)
            self._is_known = torch.zeros_like(logits, dtype=torch.bool)
            places = torch.tensor(self._prompt, dtype=torch.int64, device=logits.device)
            self._is_known.index_fill_(0, places, True)
        if rules.repetition_penalty != 1.0:
            factor = rules.repetition_penalty
            less = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._is_known, less, logits)
        if rules.presence_penalty or rules.frequency_penalty:
            cost = rules.presence_penalty + rules.frequency_penalty * self._counts
            logits = torch.where(self._counts > 0, logits - cost, logits)
        return logits

    def note(self, token: int) -> None:
        """Take note of a token of the answer, after the first that was chosen."""
        assert self._is_known is not None
        assert self._counts is not None  # it was chosen by logits that `apply` returned
        self._is_known[token].fill_(True)
        self._counts[token].add_(1)


def largest_tokens(logits: torch.Tensor) -> list[int]:
    """Return the token with the largest logit of each row (N × vocabulary), or SPOILT where a row holds NaN."""
    tokens = logits.argmax(-1, keepdim=True)
    is_spoilt = logits.gather(-1, tokens).isnan()  # argmax takes NaN for the largest
    return [int(token) for token in tokens.masked_fill(is_spoilt, SPOILT).flatten().tolist()]


def _has_penalties(rules: Sampling) -> bool:
    return rules.repetition_penalty != 1.0 or bool(rules.presence_penalty or rules.frequency_penalty)
