"""Makes a list of calls in one: from Python each would cost more time than a small product takes."""

from __future__ import annotations

from typing import Any

from ._llvm import ARGUMENTS, I64, WORKER, Kernel
from .words import ReplayWords


def build_replay(module: Any) -> None:
    """Add `replay` to the module."""
    k = Kernel(module, "replay", ReplayWords)
    calls, count = k.words("calls", "number")

    def one(i: Any) -> None:
        place = k.mul(i, I64(2))
        function = k.inttoptr(k.get(calls, place, I64), WORKER.as_pointer())
        words = k.inttoptr(k.get(calls, k.add(place, I64(1)), I64), ARGUMENTS.as_pointer())
        k.call(function, [words])

    k.loop(I64(0), count, 1, one)
    k.done()
