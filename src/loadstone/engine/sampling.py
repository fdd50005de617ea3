"""Logits → the next token, by the rules that are in force for one request.

The order is the field's usual one: penalties, temperature, top-k, top-p, min-p, then a draw. Knows logits and
tokens seen so far; nothing of text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loadstone.config import Sampling
from loadstone.errors import GenerationError

CANDIDATES = 1024  # sorted first when top-p alone cuts; all are sorted only when these do not reach p


class Sampler:
    """Chooses the tokens of one answer; the same seed chooses the same tokens from the same logits."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._prompt = set(prompt)
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
            is_spoilt = bool(probabilities.isnan().any())
            token = 0 if is_spoilt else int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])
        if is_spoilt:
            raise GenerationError(
                "The model's logits hold NaN, so no token can be chosen.",
                hint="The checkpoint may be damaged, or a weight overflows at this quantization: try another.",
            )
        self._answer[token] = self._answer.get(token, 0) + 1
        return token

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities, largest first, and their tokens, for penalised logits under a temperature above 0."""
        rules = self.sampling
        scaled = logits.cpu() / rules.temperature
        kept = min(rules.top_k or len(scaled), len(scaled))
        if rules.top_k == 0 and rules.top_p < 1.0:
            kept = min(CANDIDATES, len(scaled))
        values, tokens = _largest(scaled, kept)
        mass = torch.logsumexp(values if rules.top_k else scaled, -1)
        if rules.top_k == 0 and rules.top_p < 1.0 and float((values - mass).exp().sum()) < rules.top_p:
            values, tokens = _largest(scaled, len(scaled))
        probabilities = (values - mass).exp()
        if rules.top_p < 1.0:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < rules.top_p, 0.0)
        if rules.min_p > 0.0:
            probabilities = probabilities.where(probabilities >= rules.min_p * probabilities[0], 0.0)
        return probabilities / probabilities.sum(), tokens

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        rules = self.sampling
        if rules.repetition_penalty != 1.0 and (seen := self._prompt | self._answer.keys()):
            places = torch.tensor(sorted(seen), device=logits.device)
            found = logits[places]
            factor = rules.repetition_penalty
            logits = logits.index_copy(0, places, torch.where(found > 0, found / factor, found * factor))
        if self._answer and (rules.presence_penalty or rules.frequency_penalty):
            places = torch.tensor(list(self._answer), device=logits.device)
            counts = torch.tensor(list(self._answer.values()), dtype=logits.dtype, device=logits.device)
            cost = rules.presence_penalty + rules.frequency_penalty * counts
            logits = logits.index_add(0, places, cost, alpha=-1)
        return logits


def _largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest values in falling order, equal ones by their place, and their places."""
    if count == len(values):
        found = torch.sort(values, descending=True, stable=True)
        return found.values, found.indices
    top = torch.topk(values, count)
    return top.values, top.indices
