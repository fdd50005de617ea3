"""How each matrix is kept: checkpoints that are quantised already as they are, and what is to be left alone as it is.

Arithmetic alone: no torch.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from loadstone.quantization import find_strategy

if TYPE_CHECKING:
    from loadstone.checkpoint.coding import Coding
    from loadstone.checkpoint.spec import ModelSpec
    from loadstone.quantization.base import Strategy

FORMS = ("8bit", "4bit", "int4")
"""The strategies that may keep what others quantised."""

NEAREST = "8bit"
"""What keeps codes that no strategy keeps as they are, FP8 say: rows of 8 bits lose next to nothing of them."""

ROUNDED_BITS = 4
"""Blocks of GGUF with so many bits a weight or fewer are rounded into whatever was asked for."""


def own_strategy(spec: ModelSpec) -> str | None:
    """Return the strategy that keeps most of a checkpoint's quantised weights as they are; None where it has none."""
    if spec.quantized is None:
        return None
    if not spec.codings:  # GGUF's blocks, which are always worked out
        return NEAREST if spec.quantized.bits > ROUNDED_BITS else None

    def kept(name: str) -> int:
        strategy = find_strategy(name)
        return sum(numbers for coding, numbers in spec.codings.items() if strategy.keeps(coding))

    best = max(FORMS, key=kept)
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
    if part != "linear" or not spec.codings or own_strategy(spec) != strategy.name:
        return part
    return "linear" if kept_coding(spec, strategy, name) is not None else "lm_head"


def kept_coding(spec: ModelSpec, strategy: Strategy, name: str) -> Coding | None:
    """Return the coding that a strategy keeps a matrix of the layers in; None where it makes another form of it.

    It keeps none where what is multiplied together is not coded alike.
    """
    if spec.part_of(name) != "linear" or name in spec.left_alone:
        return None
    coding, *others = {spec.tensors[one].coding for one in spec.multiplied_with(name)}
    return coding if not others and coding is not None and strategy.keeps(coding) else None
