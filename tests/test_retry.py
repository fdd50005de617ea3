"""The retry policy: what is tried again, how long it waits, what it says and what it lets go of."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from loadstone import retry
from loadstone.errors import ConfigurationError, ResourceError, SourceError, TransientSourceError
from loadstone.retry import retry_call, retry_on_exception
from loadstone.telemetry import Event


@pytest.fixture(autouse=True)
def _no_waits() -> Iterator[None]:
    retry.set_testing(True)
    yield
    retry.set_testing(False)


def failing(times: int, error: Callable[[], BaseException]) -> tuple[Callable[[], str], list[int]]:
    """Return a function that fails `times` times and then answers, and the list of its calls."""
    calls: list[int] = []

    def function() -> str:
        calls.append(len(calls) + 1)
        if len(calls) <= times:
            raise error()
        return "done"

    return function, calls


def test_transient_failures_are_tried_again_until_the_action_succeeds() -> None:
    function, calls = failing(2, lambda: TransientSourceError("503"))
    assert retry_on_exception(3)(function)() == "done"
    assert calls == [1, 2, 3]


def test_it_stops_at_max_attempts_and_the_error_says_how_often_it_tried() -> None:
    function, calls = failing(9, lambda: TransientSourceError("503"))
    with pytest.raises(TransientSourceError, match="503") as caught:
        retry_on_exception(max_attempts=4, action="fetch it")(function)()
    assert len(calls) == 4
    assert caught.value.__notes__ == ["Tried 4 of at most 4 times to do: fetch it."]


@pytest.mark.parametrize(
    "error",
    [SourceError("404"), ConfigurationError("bad"), ResourceError("full"), MemoryError(), ValueError("no")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_transient_is_tried_once(error: BaseException) -> None:
    function, calls = failing(9, lambda: error)
    with pytest.raises(type(error)):
        retry_on_exception(5)(function)()
    assert calls == [1]


@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, BrokenPipeError])
def test_timeouts_and_broken_connections_are_transient(error: type[Exception]) -> None:
    function, calls = failing(1, error)
    assert retry_on_exception()(function)() == "done"
    assert calls == [1, 2]


def test_running_out_of_memory_is_never_retried_whatever_the_caller_says() -> None:
    function, calls = failing(9, lambda: RuntimeError("CUDA out of memory"))
    with pytest.raises(RuntimeError):
        retry_on_exception(3, retry_if=lambda error: True)(function)()
    assert calls == [1]


def test_retry_if_takes_exception_types() -> None:
    function, calls = failing(1, lambda: KeyError("a"))
    assert retry_on_exception(retry_if=(KeyError, IndexError))(function)() == "done"
    other, other_calls = failing(1, lambda: ValueError("a"))
    with pytest.raises(ValueError):
        retry_on_exception(retry_if=KeyError)(other)()
    assert (len(calls), len(other_calls)) == (2, 1)


def test_each_wait_is_an_event_with_attempt_wait_and_reason(events: list[Event]) -> None:
    function, _ = failing(2, lambda: TransientSourceError("the hub said 503"))
    retry_call(function, action="list files", event="source.retry")
    assert [event.name for event in events] == ["source.retry"] * 2
    assert [event.fields["attempt"] for event in events] == [1, 2]
    assert events[0].fields["action"] == "list files"
    assert events[0].fields["reason"] == "TransientSourceError: the hub said 503"


def test_waits_are_jittered_below_a_doubling_ceiling(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high if low == 0.0 else None)
    function, _ = failing(5, lambda: TimeoutError())
    retry_call(function, max_attempts=6, first_wait=1.0, max_wait=5.0)
    assert [event.fields["wait"] for event in events] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_the_wait_is_never_shorter_than_the_server_asked_for(events: list[Event]) -> None:
    function, _ = failing(1, lambda: TransientSourceError("429", retry_after=17.0))
    retry_call(function, first_wait=0.1, max_wait=1.0)
    assert events[0].fields["wait"] == 17.0


def test_a_server_that_asks_for_an_hour_is_not_waited_for() -> None:
    function, calls = failing(1, lambda: TransientSourceError("429", retry_after=3600.0))
    with pytest.raises(TransientSourceError) as caught:
        retry_call(function)
    assert calls == [1]
    assert "3600 s" in caught.value.__notes__[0]


def test_the_failed_attempt_is_let_go_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        pass

    kept: list[weakref.ref[Tensor]] = []
    alive_during_wait: list[bool] = []

    def attempt() -> str:
        tensor = Tensor()
        kept.append(weakref.ref(tensor))
        if len(kept) == 1:
            raise TimeoutError
        return "done"

    monkeypatch.setattr(retry, "_sleep", lambda seconds: alive_during_wait.append(kept[0]() is not None))
    gc.disable()  # so that only the policy itself can have let go of the tensor
    try:
        retry_call(attempt)
    finally:
        gc.enable()
    assert alive_during_wait == [False]


def test_waits_really_wait_when_testing_is_off(monkeypatch: pytest.MonkeyPatch, events: list[Event]) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    retry.set_testing(False)
    function, _ = failing(1, TimeoutError)
    retry_call(function)
    assert slept == [events[0].fields["wait"]]


def test_arguments_and_name_of_the_function_are_kept() -> None:
    @retry_on_exception()
    def join(first: str, *, second: str) -> str:
        """Join two."""
        return first + second

    assert join("a", second="b") == "ab"
    assert (join.__name__, join.__doc__) == ("join", "Join two.")


@pytest.mark.parametrize(
    "policy",
    [{"max_attempts": 0}, {"max_attempts": True}, {"first_wait": -1.0}, {"max_wait": float("nan")},
     {"event": "again"}],
    ids=str,
)  # fmt: skip
def test_a_policy_that_means_nothing_is_refused(policy: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        retry_on_exception(**policy)  # type: ignore[arg-type]


def test_the_decorator_without_parentheses_says_so() -> None:
    with pytest.raises(ConfigurationError, match="parentheses"):

        @retry_on_exception  # type: ignore[arg-type]
        def function() -> None: ...


def test_coroutines_are_refused_rather_than_silently_not_retried() -> None:
    with pytest.raises(TypeError, match="coroutine"):

        @retry_on_exception()
        async def function() -> None:
            await asyncio.sleep(0)
