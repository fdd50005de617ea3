"""A manager of a small model, and what its tests wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lives import PATIENCE, Wait, config_of

from loadstone import Event, ModelManager, subscribe


@pytest.fixture
def manager(small_model: Path) -> Iterator[ModelManager]:
    """A manager of the small model, not loaded yet."""
    with ModelManager(config_of(small_model)) as manager:
        yield manager


@pytest.fixture
def heard() -> Iterator[Wait]:
    """Call it to wait for an event by name; with `times`, until it came so often."""
    seen: list[Event] = []
    changed = threading.Condition()

    def note(event: Event) -> None:
        with changed:
            seen.append(event)
            changed.notify_all()

    def wait(name: str, *, times: int = 1) -> Event:
        def found() -> list[Event]:
            return [event for event in seen if event.name == name]

        with changed:
            assert changed.wait_for(lambda: len(found()) >= times, PATIENCE), f"{name} did not come {times} times"
            return found()[times - 1]

    unsubscribe = subscribe(note)
    yield wait
    unsubscribe()
