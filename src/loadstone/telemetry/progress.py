"""How far something is, told by events: bytes, tensors, and the seconds that are left."""

from __future__ import annotations

import threading
import time
from typing import Any

from .events import emit


class Progress:
    """Tells how much of `total` bytes, in `tensors` tensors, is done; safe to use from several threads.

    Each event has `done`, `total`, `tensors_done`, `tensors`, `seconds_left` (at the speed so far), and `about`.
    """

    def __init__(self, event: str, total: int, tensors: int, **about: Any) -> None:
        self._event, self._about = event, {**about, "total": total, "tensors": tensors}
        self._total, self._done, self._tensors_done = total, 0, 0
        self._started = time.perf_counter()
        self._lock = threading.Lock()

    def add(self, nbytes: int, *, is_last_of_tensor: bool) -> None:
        """Tell that `nbytes` more bytes are done, and whether a tensor is whole with them."""
        with self._lock:  # held while telling: what is told only grows
            self._done += nbytes
            self._tensors_done += is_last_of_tensor
            seconds = time.perf_counter() - self._started
            emit(
                self._event, done=self._done, tensors_done=self._tensors_done,
                seconds_left=seconds * (self._total - self._done) / max(self._done, 1), **self._about,
            )  # fmt: skip
