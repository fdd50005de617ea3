"""Ctrl-C while libraries are imported: held until they are in.

Some libraries turn a KeyboardInterrupt in the middle of their import into an error of their own, or lose it. Imports
little, because no Ctrl-C is held before this is here.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class HeldInterrupts:
    """A context in which Ctrl-C is only noted; it comes into force at the end of it.

    A second one, in case something hangs, raises KeyboardInterrupt at once. Does nothing where Ctrl-C is ignored, and
    outside the main thread.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._is_noted = False

    def __enter__(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
            return
        self._before = before  # None where it was not set from Python: left alone
        if before is not None:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._is_noted:
            signal.raise_signal(signal.SIGINT)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_noted:
            raise KeyboardInterrupt
        self._is_noted = True
