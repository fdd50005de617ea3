"""What the measured processes of `benchmarks.load` have in common: the moments that they note, and what they tell.

Moments are `time.monotonic`, which all processes of a machine share, so that the parent can count from the start of
the process. Imports nothing large: whatever is imported here would not be the side's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .page_cache import ResidentWatch
from .process_memory import memory_now

RESIDENT_LIMIT_S = 30.0


class Moments:
    """The moments of one load, in the order in which they come: imported, loaded, answered.

    `watched` are files of weights; the moment when all their bytes are in memory is noted too.
    """

    def __init__(self, watched: Sequence[str]) -> None:
        self._at: dict[str, float | None] = {"imported": time.monotonic()}
        self._watch = ResidentWatch([Path(file) for file in watched], RESIDENT_LIMIT_S)
        self._watch.start()

    def note(self, name: str) -> None:
        """Note that `name` is done now."""
        self._at[name] = time.monotonic()

    def told(self, prompt_tokens: int, phases: dict[str, float]) -> dict[str, Any]:
        """Return what the parent wants to know, once the first token is there and the files are watched to the end."""
        self._at["resident"] = self._watch.whole_at()
        return {"at": self._at, "prompt_tokens": prompt_tokens, "phases_s": phases, **memory_now()}
