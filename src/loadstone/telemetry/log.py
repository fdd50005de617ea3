"""The subscriber that writes events to the standard library's logging, as text or as JSON lines."""

from __future__ import annotations

import json
import logging

from .events import Event

logger = logging.getLogger("loadstone")
logger.addHandler(logging.NullHandler())  # a library prints nothing that its user did not ask for

QUIET = frozenset({"download.progress", "load.progress", "store.progress", "store.writing", "generate.read"})


def log_event(event: Event) -> None:
    """Write one event at INFO (progress at DEBUG; `*.retry`, `*.warning`, `*.step_down` and failures at WARNING).

    The record carries the event's fields as `record.loadstone`, so that a handler can write them its own way.
    """
    failed = event.fields.get("ok") is False or event.name.endswith((".retry", ".warning", ".step_down"))
    level = logging.DEBUG if event.name in QUIET else logging.WARNING if failed else logging.INFO
    text = " ".join(f"{key}={_plain(value)}" for key, value in event.fields.items())
    logger.log(level, "%s %s", event.name, text, extra={"loadstone": {"event": event.name, **event.fields}})


class JsonFormatter(logging.Formatter):
    """Formats each record as one JSON object: time, level, event and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        fields = getattr(record, "loadstone", {"message": record.getMessage()})
        return json.dumps(
            {"time": record.created, "level": record.levelname.lower(), **fields}, ensure_ascii=False, default=str
        )


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and " " in value else str(value)
