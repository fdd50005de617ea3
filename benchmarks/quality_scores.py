"""Scores of a model's next-token distributions on windows of tokens, beside those of a reference.

Knows logits and a file with the reference's logarithms of probabilities; not who made them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Forward = Callable[[Sequence[int]], torch.Tensor]
"""Takes the tokens of one window, T, and returns the logits after each, T × vocabulary."""


@dataclass(frozen=True)
class Score:
    """Means over a window's predictions, of which there is one less than tokens.

    `loss` is the negative log-likelihood of the tokens that followed, and `divergence` the reference's Kullback-Leibler
    divergence to this one, both in nats; `agreement` is the share of predictions whose likeliest token is also the
    reference's.
    """

    predictions: int
    loss: float
    divergence: float
    agreement: float


def score(windows: Sequence[Sequence[int]], vocabulary: int, file: Path, forward: Forward) -> list[Score]:
    """Return the score of each window; the first side to come writes `file` and so is the reference.

    The file has 4 bytes for each prediction and each token of the vocabulary.
    """
    is_reference = not file.exists()
    predictions = sum(len(window) - 1 for window in windows)
    kept = torch.from_file(str(file), shared=True, size=predictions * vocabulary).view(predictions, vocabulary)
    scores, start = [], 0
    for window in windows:
        found = torch.log_softmax(forward(window)[:-1].float(), -1)
        wanted = kept[start : start + len(found)]
        if is_reference:
            wanted.copy_(found)
        scores.append(_score(found, wanted, torch.tensor(window[1:])))
        start += len(found)
    return scores


def _score(found: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> Score:
    """Compare logarithms of probabilities, both T × vocabulary, for the T tokens that followed."""
    loss = -found.gather(1, targets.unsqueeze(1)).double().mean()
    divergence = (wanted.exp() * (wanted - found)).sum(-1).double().mean()
    agreement = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    return Score(len(targets), float(loss), float(divergence), float(agreement))


def mean(scores: Sequence[Score]) -> dict[str, float]:
    """Return perplexity, divergence in nats and agreement over all predictions of several windows."""
    total = sum(one.predictions for one in scores)

    def over(values: Sequence[float]) -> float:
        return sum(value * one.predictions for value, one in zip(values, scores, strict=True)) / total

    return {
        "perplexity": math.exp(over([one.loss for one in scores])),
        "divergence": over([one.divergence for one in scores]),
        "agreement": over([one.agreement for one in scores]),
    }


def ratio(ours: Sequence[Score], theirs: Sequence[Score]) -> tuple[float, float | None]:
    """Return how many times as large our perplexity is as theirs on the same windows, and its standard error.

    The error is that of the mean difference of the windows' losses, or None for a single window, which has none.
    """
    differences = [one.loss - other.loss for one, other in zip(ours, theirs, strict=True)]
    found = mean(ours)["perplexity"] / mean(theirs)["perplexity"]
    if len(differences) < 2:
        return found, None
    return found, found * statistics.stdev(differences) / math.sqrt(len(differences))


def scores_of(told: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return the scores that a process printed."""
    return [Score(**one) for one in told]
