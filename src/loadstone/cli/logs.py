"""What of the log a person sees: warnings in plain words, or the log itself for who asks.

`--verbose` and LOADSTONE_LOG=info show what happens, LOADSTONE_LOG=debug also how far it is, and
LOADSTONE_LOG=json writes one JSON object a line. All of it goes to standard error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from loadstone.errors import ConfigurationError

from .output import say, say_warning

LEVELS = {"warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG, "json": logging.INFO}

FEW = 3  # names that a warning tells

_logger = logging.getLogger("loadstone")


def configure(wish: str | None) -> None:
    """Show the log as `wish` has it: "warning" (when None or empty), "info", "debug" or "json"."""
    name = (wish or "warning").strip().lower()
    if name not in LEVELS:
        raise ConfigurationError(
            f"LOADSTONE_LOG is {wish!r}; known are {', '.join(LEVELS)}", key="LOADSTONE_LOG", hint="Or unset it."
        )
    for handler in [one for one in _logger.handlers if isinstance(one, _Shown)]:
        _logger.removeHandler(handler)
    _logger.addHandler(_Shown(name))
    _logger.setLevel(LEVELS[name])
    _logger.propagate = False


def is_debugging() -> bool:
    """Tell whether everything is shown, tracebacks too."""
    return _logger.level == logging.DEBUG


class _Shown(logging.Handler):
    """Writes to whatever standard error is now: a progress bar puts itself in its place while it is shown."""

    def __init__(self, wish: str) -> None:
        super().__init__()
        self.is_brief = wish == "warning"
        if wish == "json":
            from loadstone.telemetry.log import JsonFormatter

            self.setFormatter(JsonFormatter())
        else:
            self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_brief:
            say(self.format(record))
        elif (text := _in_words(record)) is not None:
            say_warning(text)


def _in_words(record: logging.LogRecord) -> str | None:
    """Return what a person should know of a record; None when the error that follows says it."""
    fields: Mapping[str, Any] = getattr(record, "loadstone", {})
    if fields.get("ok") is False:
        return None
    if str(fields.get("event", "")).endswith(".retry"):
        tries = f"attempt {fields['attempt'] + 1} of {fields['max_attempts']}"
        return f"could not {fields['action']} ({fields['reason']}); {tries} in {fields['wait']:.1f} s"
    text = fields.get("reason") or fields.get("message") or record.getMessage()
    place = fields.get("file")
    instead = f"; instead: {fields['instead']}" if "instead" in fields else ""
    about = [str(place)] if place and str(place) not in str(text) else []
    if fields.get("tensors"):
        about.append(_some(fields["tensors"]))
    return f"{text}{instead}" + (f" ({'; '.join(about)})" if about else "")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
