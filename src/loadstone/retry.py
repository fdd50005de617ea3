"""The one retry policy: the same action again, later, when the failure was transient.

Knows waiting and counting. What is transient is said by `errors.is_transient`; running out of memory is never
retried, whatever the caller says, because the same action would need the same memory again.
"""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from loadstone.errors import ConfigurationError, is_out_of_memory, is_transient, wait_asked_for
from loadstone.telemetry import emit

LONGEST_RETRY_AFTER = 120.0
"""Seconds; a server that asks for a longer wait is not waited for: the error says when to come back."""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
RetryIf = Callable[[BaseException], bool] | type[BaseException] | tuple[type[BaseException], ...]

_is_testing = False


def set_testing(is_testing: bool = True) -> None:
    """Turn waits off (True) or on again (False) for the whole process; attempts and events stay."""
    global _is_testing
    _is_testing = is_testing


def retry_on_exception(
    max_attempts: int = 3,
    *,
    first_wait: float = 1.0,
    max_wait: float = 30.0,
    retry_if: RetryIf = is_transient,
    action: str | None = None,
    event: str = "call.retry",
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator that calls a function again when it fails for a transient reason.

    The wait before attempt n + 1 is drawn evenly from 0 to min(max_wait, first_wait · 2ⁿ⁻¹) seconds
    (exponential backoff with full jitter), and is never shorter than the error's `retry_after`. `retry_if`
    is a predicate or exception types. Each wait emits `event` with action, attempt, max_attempts, wait
    (seconds) and reason. The last error is raised as it is, with a note that says how often the action was
    tried. Raises ConfigurationError for a policy that means nothing.
    """
    _check(max_attempts, first_wait, max_wait, event)

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            # Calling one only makes an object; its failures come later, where this decorator is not.
            raise TypeError(f"{function!r} is a coroutine or a generator; only plain functions are retried")

        name = action if action is not None else str(getattr(function, "__qualname__", function))

        @functools.wraps(function)
        def attempt_again(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            return retry_call(
                lambda: function(*args, **kwargs),
                max_attempts=max_attempts,
                first_wait=first_wait,
                max_wait=max_wait,
                retry_if=retry_if,
                action=name,
                event=event,
            )

        return attempt_again

    return decorate


def retry_call(
    function: Callable[[], Result],
    *,
    max_attempts: int = 3,
    first_wait: float = 1.0,
    max_wait: float = 30.0,
    retry_if: RetryIf = is_transient,
    action: str = "the call",
    event: str = "call.retry",
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Result:
    """Return what `function` returns, calling it up to `max_attempts` times; see `retry_on_exception`.

    `about` are fields for the events, such as the model.
    """
    _check(max_attempts, first_wait, max_wait, event)
    attempt = 1
    while True:
        try:
            return function()
        except Exception as error:
            wait = _next_wait(error, attempt, max_attempts, first_wait, max_wait, retry_if)
            if wait is None:
                if attempt > 1:
                    error.add_note(f"Tried {attempt} of at most {max_attempts} times to do: {action}.")
                raise
            reason = f"{type(error).__name__}: {_first_line(error)}"
        # Outside the except block: while it waits, the error and its traceback, which pin every local of the
        # failed attempt (tensors among them), are gone.
        counted = {"attempt": attempt, "max_attempts": max_attempts, "wait": wait}
        emit(event, **about, action=action, **counted, reason=reason)
        _sleep(wait)
        attempt += 1


def _next_wait(
    error: Exception, attempt: int, max_attempts: int, first_wait: float, max_wait: float, retry_if: RetryIf
) -> float | None:
    """Return the seconds to wait before the next attempt, None when there shall be none."""
    if attempt >= max_attempts or is_out_of_memory(error) or not _matches(error, retry_if):
        return None
    asked = wait_asked_for(error) or 0.0
    if asked > LONGEST_RETRY_AFTER:
        error.add_note(f"The server asks to wait {asked:.0f} s; try again after that.")
        return None
    # The exponent is bounded because 2.0 ** 1024 overflows, long after max_wait has taken over.
    ceiling = min(max_wait, first_wait * 2.0 ** min(attempt - 1, 60))
    return max(random.uniform(0.0, ceiling), float(asked))


def _matches(error: Exception, retry_if: RetryIf) -> bool:
    if isinstance(retry_if, (type, tuple)):
        return isinstance(error, retry_if)
    return retry_if(error)


def _sleep(seconds: float) -> None:
    if not _is_testing:
        time.sleep(seconds)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _check(max_attempts: int, first_wait: float, max_wait: float, event: str) -> None:
    if not isinstance(max_attempts, int) or isinstance(max_attempts, bool) or max_attempts < 1:
        raise ConfigurationError(
            f"max_attempts is {max_attempts!r}; it must be a whole number of 1 or more",
            key="max_attempts",
            hint="Write @retry_on_exception() with parentheses." if callable(max_attempts) else None,
        )
    for key, wait in (("first_wait", first_wait), ("max_wait", max_wait)):
        if not 0 <= wait < float("inf"):
            raise ConfigurationError(f"{key} is {wait!r}; it must be 0 seconds or more", key=key)
    if not event.endswith(".retry"):
        raise ConfigurationError(f"event is {event!r}; the name of a retry event ends in .retry", key="event")
