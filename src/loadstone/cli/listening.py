"""Events heard while something runs, for commands that tell afterwards what happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loadstone.telemetry import Event, subscribe


@contextmanager
def heard(*names: str) -> Iterator[list[Event]]:
    """Collect the events of these names while the block runs."""
    events: list[Event] = []

    def hear(event: Event) -> None:
        if event.name in names:
            events.append(event)

    unsubscribe = subscribe(hear)
    try:
        yield events
    finally:
        unsubscribe()
