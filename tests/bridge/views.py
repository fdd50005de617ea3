"""A checkpoint, our decoder of it, and that decoder as a model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

from loadstone.bridge._transformers import make_model
from loadstone.bridge.lent import Loan
from loadstone.checkpoint.spec import ModelSpec
from loadstone.model import Decoder
from loadstone.model.recipe import taken_apart


@dataclass(frozen=True)
class Seen:
    """A checkpoint, our decoder of it, and that decoder as a transformers model."""

    folder: Path
    spec: ModelSpec
    decoder: Decoder
    loan: Loan
    model: Any


def see(place: Path, strategy: str = "none") -> Seen:
    """Load a folder or a file, and return it with what transformers sees."""
    decoder, spec, _ = tiny.load(place, strategy=strategy)
    loan = Loan(taken_apart(spec, decoder), decoder.dtype, decoder.device, lambda count: None)
    return Seen(place, spec, decoder, loan, make_model(spec, loan))
