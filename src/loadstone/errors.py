"""Every error Loadstone raises, and which of them are worth another try.

    LoadstoneError
    ├── ConfigurationError (ValueError)      what was asked for cannot be meant: exit 2
    ├── ModelLoadError (RuntimeError)        a model could not be made ready: exit 5
    │   ├── SourceError                      its files could not be had: exit 3
    │   │   └── TransientSourceError         … this time; a retry may succeed
    │   └── CheckpointError                  its files are not what they must be: exit 3
    ├── ResourceError (MemoryError)          it does not fit, or memory ran out: exit 4
    └── GenerationError (RuntimeError)       an answer could not be made: exit 5
        ├── ModelNotLoadedError              … because no model is loaded
        ├── ContextLengthError               … because the prompt is longer than the context
        └── QueueFullError                   … because too many requests wait already

A message says what was needed, what there was, and which setting to turn; the same facts are attributes.
"""

from __future__ import annotations

from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType


class LoadstoneError(Exception):
    """Base of all errors of this library; `exit_code` is what the command line ends with."""

    exit_code = 5

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n  {hint}")
        self.message = message
        self.hint = hint


class ConfigurationError(LoadstoneError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        place = f"{file}:{line}: " if file and line else f"{file}: " if file else ""
        super().__init__(place + message, hint=hint)
        self.file = file
        self.line = line
        self.key = key


class ModelLoadError(LoadstoneError, RuntimeError):
    """A model could not be made ready to answer."""


class SourceError(ModelLoadError):
    """A model's files could not be had: not there, not allowed, or not reachable."""

    exit_code = 3


class TransientSourceError(SourceError):
    """A model's files could not be had this time: a timeout, a reset, 429 or 5xx.

    `retry_after` is the wait in seconds that the server asked for, if it did.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class CheckpointError(ModelLoadError):
    """A model's files are truncated, inconsistent, or of a kind that is not read."""

    exit_code = 3

    def __init__(self, message: str, *, file: Path | str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{file}: {message}" if file else message, hint=hint)
        self.file = file


class ResourceError(LoadstoneError, MemoryError):
    """Something does not fit: `needed` and `allowed` in bytes, `would_fit` in words, where known."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        needed: int | None = None,
        allowed: int | None = None,
        would_fit: tuple[str, ...] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.allowed = allowed
        self.would_fit = would_fit


class GenerationError(LoadstoneError, RuntimeError):
    """An answer could not be made."""


class ModelNotLoadedError(GenerationError):
    """An answer was asked of a manager that holds no model."""


class ContextLengthError(GenerationError):
    """A prompt leaves no room for an answer: it has `prompt_tokens`, and the context `context`."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; the context has {context} with room for at least one more.",
            hint="Shorten the prompt, or load the model with a larger `context`.",
        )
        self.prompt_tokens = prompt_tokens
        self.context = context


class QueueFullError(GenerationError):
    """More requests wait than may."""


# What HTTP libraries call timeouts and broken connections; they share no base class but these names.
_TRANSIENT_NAMES = frozenset(
    ("Timeout", "TimeoutException", "NetworkError", "ConnectionError", "RemoteProtocolError", "ProtocolError")
)
_TRANSIENT_STATUS = frozenset((408, 425, 429))


def is_transient(error: BaseException) -> bool:
    """Tell whether the same action may succeed when simply repeated.

    True for `TransientSourceError`, timeouts and broken connections, and HTTP's 408, 425, 429 and 5xx, from the
    standard library and from requests, httpx, urllib3 and their like. Never for anything about memory,
    configuration or permission.
    """
    if isinstance(error, LoadstoneError):
        return isinstance(error, TransientSourceError)
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(reason := getattr(error, "reason", None), BaseException):  # urllib's URLError wraps the cause
        return is_transient(reason)
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)


def wait_asked_for(error: BaseException) -> float | None:
    """Return the seconds that a server asked to wait (Retry-After), where the error says so in seconds."""
    if (known := getattr(error, "retry_after", None)) is not None:
        return float(known)
    holder = getattr(error, "response", None)
    headers = getattr(error if holder is None else holder, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() else None


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    for status in (getattr(response, "status_code", None), getattr(error, "code", None)):
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, whichever library says so."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
        or "invalid buffer size" in text  # larger than Metal takes in one
    )  # fmt: skip


class handle_exceptions(ContextDecorator):
    """Translate foreign exceptions raised in a block, or in a decorated function, into `into`, keeping the cause.

    Loadstone's own errors pass unchanged, as do KeyboardInterrupt and SystemExit; running out of memory becomes
    ResourceError. `action` completes the sentence "Could not …".
    """

    def __init__(self, action: str, *, into: type[LoadstoneError] = ModelLoadError) -> None:
        self.action = action
        self.into = into

    def __enter__(self) -> handle_exceptions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, LoadstoneError):
            return
        if is_out_of_memory(error):
            raise ResourceError(
                f"Memory ran out while trying to {self.action}: {error}",
                hint="Lower `context` or choose a stronger `quantization`.",
            ) from error
        raise self.into(f"Could not {self.action}: {type(error).__name__}: {error}") from error
