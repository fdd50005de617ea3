"""How much one step may do, and what it does less of where memory does not suffice for it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from loadstone.hardware import memory_limits
from loadstone.planner.ladder import SMALLEST_CHUNK
from loadstone.units import format_size

MOST_TOGETHER = 64  # sequences in one step; more would make every one of them slow
LOOK_S = 0.25  # between two looks at the machine's memory


@dataclass(frozen=True)
class Width:
    """Tokens of prompts that are read in one step, sequences in it, and whether what they say next is guessed."""

    chunk: int
    together: int = MOST_TOGETHER
    guesses: bool = True

    def __str__(self) -> str:
        guessed = "" if self.guesses else ", without guesses"
        return f"{self.chunk} prompt tokens and {self.together} sequences a step{guessed}"

    def narrower(self) -> Width | None:
        """Return the next width down, which needs less memory, or None."""
        if self.chunk > SMALLEST_CHUNK:
            return replace(self, chunk=max(self.chunk // 2, SMALLEST_CHUNK))
        if self.guesses:
            return replace(self, guesses=False)
        if self.together > 1:
            return replace(self, together=self.together // 2)
        return None


class Pressure:
    """Whether the machine, or a control group above this process, has less than `reserve` bytes left for it."""

    def __init__(self, reserve: int) -> None:
        self._reserve = reserve
        self._looked_at = 0.0
        self._left = reserve

    def is_felt(self) -> bool:
        """Tell how it was at most a quarter of a second ago."""
        if time.monotonic() - self._looked_at > LOOK_S:
            self._left = memory_limits().free_bytes
            self._looked_at = time.monotonic()
        return self._left < self._reserve

    def __str__(self) -> str:
        left, reserve = format_size(self._left), format_size(self._reserve)
        return f"{left} of memory is left, and the largest step may take {reserve}"
