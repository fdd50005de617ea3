"""What is under way, as bars on standard error while it lasts; nothing where that is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.telemetry import Event, subscribe

if TYPE_CHECKING:
    from ._rich import Bars


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
