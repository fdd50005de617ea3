"""One stream of events for the whole process.

Knows names and plain values, nothing of what they mean. An event costs nothing to speak of when nobody subscribes,
and a subscriber that raises is logged once and never breaks the work it watches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_log = logging.getLogger("loadstone.telemetry")


@dataclass(frozen=True)
class Event:
    """Something that happened: a dotted name (`load.weights`, `download.progress`) and plain values.

    `fields` holds sizes in bytes, times in seconds, and names as text. `time` is seconds since the epoch.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


Subscriber = Callable[[Event], None]

_subscribers: tuple[Subscriber, ...] = ()
_lock = threading.Lock()


def subscribe(subscriber: Subscriber) -> Callable[[], None]:
    """Call `subscriber` with each event from now on; return the function that ends it."""
    global _subscribers
    with _lock:
        _subscribers = (*_subscribers, subscriber)

    def unsubscribe() -> None:
        global _subscribers
        with _lock:
            _subscribers = tuple(one for one in _subscribers if one is not subscriber)

    return unsubscribe


def emit(name: str, **fields: Any) -> None:
    """Tell all subscribers that `name` happened."""
    if not _subscribers:
        return
    event = Event(name, MappingProxyType(fields))
    for subscriber in _subscribers:
        try:
            subscriber(event)
        except Exception:  # noqa: BLE001 - a watcher must never break what it watches
            _log.exception("subscriber %r failed on %s", subscriber, name)


@contextmanager
def timed(name: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Emit `name` with `seconds` and `ok` when the block ends, and `error` when it raises.

    The yielded mapping adds fields that are known only then.
    """
    started = time.perf_counter()
    more: dict[str, Any] = {}
    try:
        yield more
        more["ok"] = True
    except BaseException as error:
        first_line = (str(error).splitlines() or [""])[0]
        more |= {"ok": False, "error": f"{type(error).__name__}: {first_line}"}
        raise
    finally:
        emit(name, **{**fields, **more, "seconds": time.perf_counter() - started})
