"""Turns rows of codes for `wide.py`: a word of each of sixteen rows side by side, then the next word of each."""

from __future__ import annotations

from typing import Any

from loadstone.quantization.codes import LANES

from ._llvm import I32, I64, Kernel
from .words import TurningWords


def build_turning(module: Any) -> None:
    """Add `turn` to the module."""
    k = Kernel(module, "turn", TurningWords)
    plain, turned, first, rows, words = k.words("plain", "turned", "first", "rows", "words")

    def row(r: Any) -> None:
        place = k.add(first, r)
        group, lane = k.udiv(place, I64(LANES)), k.urem(place, I64(LANES))
        here = k.add(plain, k.mul(r, k.mul(words, I64(4))))
        there = k.add(turned, k.mul(k.add(k.mul(group, k.mul(words, I64(LANES))), lane), I64(4)))
        k.loop(I64(0), words, 1, lambda w: k.put(k.get(here, w, I32), there, k.mul(w, I64(LANES))))

    k.loop(I64(0), rows, 1, row)
    k.done()
