"""What is under way, as bars on standard error while it lasts; nothing where that is not a terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from loadstone.telemetry import Event, subscribe

if TYPE_CHECKING:
    from loadstone.engine import Chunk, Stream

    from ._rich import Bars


READING = "Reading the prompt"
KEEPING = "Storing weights (Ctrl-C skips it)"
PHASES = {"compare": "Comparing with what is stored"}


@contextmanager
def shown_progress(waiting: str) -> Iterator[None]:
    """Show `waiting` while the block runs, and bars for what events say of downloads and loads.

    Everything is wiped away at the end. Where somebody asked for a log with LOADSTONE_LOG, it has the terminal alone.
    """
    if not _is_wanted():
        yield
        return
    from ._rich import Bars

    bars = Bars(waiting)
    with bars.shown():
        unsubscribe = subscribe(lambda event: _follow(event, bars))
        try:
            yield
        finally:
            unsubscribe()


def chunks_of(stream: Stream) -> Iterator[Chunk]:
    """Yield the chunks of an answer; before the first, show how much of a long prompt is read."""
    with ExitStack() as until_the_first:
        if _is_wanted():
            reading = _Reading()
            until_the_first.callback(reading.end)
            until_the_first.callback(subscribe(reading.follow))
        for chunk in stream:
            until_the_first.close()
            yield chunk


class _Reading:
    """A bar that begins with the first event that says how far a prompt is read, in the thread that reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown = ExitStack()
        self._bars: Bars | None = None
        self._is_over = False

    def follow(self, event: Event) -> None:
        """Show an event of a prompt."""
        if event.name != "generate.read":
            return
        with self._lock:
            if self._is_over:
                return
            if self._bars is None:
                from ._rich import TOKENS, Bars

                self._bars = Bars(sized=TOKENS)
                self._shown.enter_context(self._bars.shown())
            self._bars.update(READING, event.fields["tokens"], event.fields["of"])

    def end(self) -> None:
        """Wipe it away, and begin none any more."""
        with self._lock:
            self._is_over = True
            self._shown.close()


def _is_wanted() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("LOADSTONE_LOG")


def _follow(event: Event, bars: Bars) -> None:
    """Show an event that says how far something is."""
    if event.name == "download.progress":
        bars.update(f"Fetching {event.fields['file']}", event.fields["done"], event.fields["total"])
    elif event.name == "load.progress":
        bars.update(PHASES.get(event.fields.get("phase", ""), "Loading"), event.fields["done"], event.fields["total"])
    elif event.name == "store.writing":
        bars.update(KEEPING, event.fields["done"], event.fields["total"])
    elif event.name == "store.progress":
        what = f"Checking {event.fields['model']} in {event.fields['strategy']}"
        bars.update(what, event.fields["done"], event.fields["total"])
