"""How each matrix is kept: checkpoints that are quantised already as they are, and what is to be left alone as it is.

Arithmetic alone: no torch.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from loadstone.quantization import find_strategy

from .ladder import LADDER

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec
    from loadstone.quantization.base import Strategy

NEAREST = "8bit"
"""What keeps codes that no strategy keeps as they are, FP8 say: rows of 8 bits lose next to nothing of them."""


def own_strategy(spec: ModelSpec) -> str | None:
    """Return the strategy that keeps most of a checkpoint's quantised weights as they are; None where it has none."""
    if spec.quantized is None:
        return None

    def kept(name: str) -> int:
        strategy = find_strategy(name)
        return sum(numbers for coding, numbers in spec.codings.items() if strategy.keeps(coding))

    best = max(LADDER, key=kept)
    return best if kept(best) else NEAREST


def strategy_of(spec: ModelSpec, strategy: Strategy, name: str) -> Strategy:
    """Return what keeps the matrix called `name`: the plan's strategy, or none for one that is left alone."""
    return find_strategy("none") if name in spec.left_alone else strategy


def kept_name(spec: ModelSpec, strategy: str) -> str:
    """Return a name for how the whole model is kept: the strategy's, and a mark where matrices are left alone."""
    if not spec.left_alone:
        return strategy
    mark = sha256("\0".join(sorted(spec.left_alone)).encode()).hexdigest()[:6]
    return f"{strategy}, {len(spec.left_alone)} matrices left alone ({mark})"


def kind_of(spec: ModelSpec, strategy: Strategy, name: str) -> str:
    """Return as what kind a strategy is to keep a matrix: "linear", "embedding" or "lm_head".

    An embedding that is the head too is "lm_head", because it is multiplied. So is a matrix of the layers that the
    checkpoint's maker left as it was where others were quantised: it is worth as much care, and a strategy that keeps
    the others as they are would spoil it. What is multiplied together is kept alike.
    """
    part = spec.part_of(name)
    if part == "embedding" and spec.tied_embeddings:
        return "lm_head"
    if part != "linear" or spec.quantized is None or own_strategy(spec) != strategy.name:
        return part
    codings = {spec.tensors[one].coding for one in spec.multiplied_with(name)}
    coding = codings.pop()
    return "linear" if not codings and coding is not None and strategy.keeps(coding) else "lm_head"
