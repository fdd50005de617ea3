"""Logits → the next token, by the rules that are in force for one request.

The order is the field's usual one: penalties, temperature, top-k, top-p, min-p, then a draw. Knows logits and
tokens seen so far; nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loadstone.config import Sampling
from loadstone.errors import GenerationError

CANDIDATES = 1024  # what top-p looks at first; all are sorted only when these do not reach p


class Sampler:
    """Chooses the tokens of one answer; the same seed chooses the same tokens from the same logits."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._prompt = set(prompt)
        self._in_prompt = torch.tensor([*self._prompt], dtype=torch.int64)
        self._answer: dict[int, int] = {}
        self._generator = torch.Generator()
        self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token for `logits` (vocabulary, float32), and remember it.

        Raises GenerationError when the logits hold NaN: the weights, or an overflow, have spoilt them.
        """
        logits = self._penalised(logits)
        if self.sampling.greedy:
            token = int(logits.argmax())
            is_spoilt = bool(logits[token].isnan())  # argmax takes NaN for the largest
        else:
            probabilities, tokens = self.distribution(logits)
            reached = probabilities.cumsum(-1, dtype=torch.float64)
            is_spoilt = bool(reached[-1].isnan())
            # One draw and a search; torch.multinomial draws once for every token, which takes 5 ms for 150,000.
            point = torch.rand((), dtype=torch.float64, generator=self._generator) * reached[-1]
            place = min(int(torch.searchsorted(reached, point, right=True)), len(tokens) - 1)
            token = int(tokens[place])
        if is_spoilt:
            raise GenerationError(
                "The model's logits hold NaN, so no token can be chosen.",
                hint="The checkpoint may be damaged, or a weight overflows at this quantization: try another.",
            )
        self._answer[token] = self._answer.get(token, 0) + 1
        return token

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the probabilities of what may be chosen, and its tokens, for penalised logits.

        The temperature is above 0. Tokens that a rule drops are not there, or have the probability 0.
        """
        rules = self.sampling
        values = logits.cpu() / rules.temperature
        tokens = torch.arange(len(values))
        if 0 < rules.top_k < len(values):
            values, tokens = torch.topk(values, rules.top_k)
        probabilities = (values - torch.logsumexp(values, -1)).exp()
        if rules.top_p < 1.0:
            probabilities, places = _likeliest(probabilities, rules.top_p)
            tokens = tokens[places]
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < rules.top_p, 0.0)
        if rules.min_p > 0.0:
            probabilities = probabilities.where(probabilities >= rules.min_p * probabilities.max(), 0.0)
        return probabilities / probabilities.sum(), tokens

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        rules = self.sampling
        if rules.repetition_penalty != 1.0:
            more = torch.tensor([token for token in self._answer if token not in self._prompt], dtype=torch.int64)
            places = torch.cat((self._in_prompt, more)).to(logits.device)
            found = logits[places]
            factor = rules.repetition_penalty
            logits = logits.index_copy(0, places, torch.where(found > 0, found / factor, found * factor))
        if self._answer and (rules.presence_penalty or rules.frequency_penalty):
            places = torch.tensor(list(self._answer), device=logits.device)
            counts = torch.tensor(list(self._answer.values()), dtype=logits.dtype, device=logits.device)
            cost = rules.presence_penalty + rules.frequency_penalty * counts
            logits = logits.index_add(0, places, cost, alpha=-1)
        return logits


def _likeliest(probabilities: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest probabilities in falling order, enough to reach `share`, and their places."""
    if len(probabilities) > CANDIDATES:
        top = torch.topk(probabilities, CANDIDATES)
        if float(top.values.sum()) >= share:
            return top.values, top.indices
    every = torch.sort(probabilities, descending=True)
    return every.values, every.indices
