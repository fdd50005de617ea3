"""Claims about the error tree, what is transient, and how foreign errors are translated."""

from __future__ import annotations

import pickle
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message

import httpx2
import pytest
import requests

from loadstone import errors
from loadstone.errors import (
    CheckpointError,
    ConfigurationError,
    GenerationError,
    LoadstoneError,
    ModelLoadError,
    ModelNotLoadedError,
    ResourceError,
    SourceError,
    TransientSourceError,
    handle_exceptions,
    is_out_of_memory,
    is_transient,
    wait_asked_for,
)


@pytest.mark.parametrize(
    ("kind", "parents", "exit_code"),
    [
        (ConfigurationError, (LoadstoneError, ValueError), 2),
        (ModelLoadError, (LoadstoneError, RuntimeError), 5),
        (SourceError, (ModelLoadError,), 3),
        (TransientSourceError, (SourceError,), 3),
        (CheckpointError, (ModelLoadError,), 3),
        (ResourceError, (LoadstoneError, MemoryError), 4),
        (GenerationError, (LoadstoneError, RuntimeError), 5),
        (ModelNotLoadedError, (GenerationError,), 5),
    ],
)
def test_each_error_is_what_the_drawing_says(
    kind: type[LoadstoneError], parents: tuple[type, ...], exit_code: int
) -> None:
    assert all(issubclass(kind, parent) for parent in parents)
    assert kind.exit_code == exit_code
    assert kind.__name__ in (errors.__doc__ or "")


def test_the_drawing_has_every_error() -> None:
    def tree(kind: type[LoadstoneError]) -> Iterator[str]:
        yield kind.__name__
        for child in kind.__subclasses__():
            if child.__module__ == errors.__name__:
                yield from tree(child)

    assert all(name in (errors.__doc__ or "") for name in tree(LoadstoneError))


def test_a_configuration_error_begins_with_its_place_and_ends_with_its_hint() -> None:
    error = ConfigurationError("no", file="a.yaml", line=3, key="k", hint="Write yes.")
    assert str(error) == "a.yaml:3: no\n  Write yes."
    assert (error.file, error.line, error.key, error.hint) == ("a.yaml", 3, "k", "Write yes.")
    assert str(ConfigurationError("no", file="a.yaml")) == "a.yaml: no"
    assert str(ConfigurationError("no")) == "no"


def test_a_checkpoint_error_begins_with_its_file() -> None:
    assert str(CheckpointError("cut off", file="x.gguf")) == "x.gguf: cut off"


@pytest.mark.parametrize(
    "error",
    [
        ConfigurationError("a", file="f", line=1, key="k", hint="h"),
        ResourceError("a", needed=2, allowed=1, would_fit=("4bit",), hint="h"),
        TransientSourceError("a", retry_after=2.5),
        CheckpointError("a", file="f"),
    ],
)
def test_errors_keep_their_facts_between_processes(error: LoadstoneError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    "error", [TransientSourceError("503"), TimeoutError(), ConnectionResetError(), BrokenPipeError()]
)
def test_what_may_pass_is_transient(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        SourceError("404"),
        ConfigurationError("no"),
        CheckpointError("cut off"),
        ResourceError("too large"),
        MemoryError(),
        PermissionError(),
        FileNotFoundError(),
        RuntimeError("CUDA out of memory"),
        ValueError(),
        KeyboardInterrupt(),
    ],
)
def test_what_will_fail_again_is_not_transient(error: BaseException) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize(
    ("error", "means_memory"),
    [
        (MemoryError(), True),
        (ResourceError("too large"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("Invalid buffer size: 8.21 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised_whoever_says_it(error: Exception, means_memory: bool) -> None:
    assert is_out_of_memory(error) is means_memory


def test_foreign_errors_are_translated_with_their_cause() -> None:
    cause = KeyError("weight")
    with pytest.raises(ModelLoadError, match="Could not read the file: KeyError: 'weight'") as caught:
        with handle_exceptions("read the file"):
            raise cause
    assert caught.value.__cause__ is cause


def test_the_error_to_translate_into_may_be_chosen() -> None:
    with pytest.raises(GenerationError, match="Could not answer"):
        with handle_exceptions("answer", into=GenerationError):
            raise KeyError("prompt")


def test_a_stop_iteration_is_translated_too() -> None:
    """An empty iterator inside the block must not end a loop outside it."""
    with pytest.raises(GenerationError):
        with handle_exceptions("answer", into=GenerationError):
            next(iter(()))


@pytest.mark.parametrize("cause", [MemoryError("no room"), RuntimeError("CUDA out of memory")])
def test_running_out_of_memory_becomes_a_resource_error(cause: Exception) -> None:
    with pytest.raises(ResourceError, match="Memory ran out while trying to load") as caught:
        with handle_exceptions("load"):
            raise cause
    assert caught.value.__cause__ is cause
    assert caught.value.hint


@pytest.mark.parametrize("error", [SourceError("404"), ResourceError("too large"), KeyboardInterrupt(), SystemExit(3)])
def test_our_own_errors_and_interrupts_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        with handle_exceptions("load"):
            raise error
    assert caught.value is error


def test_it_works_as_a_decorator_each_time() -> None:
    @handle_exceptions("halve", into=GenerationError)
    def halve(number: int) -> int:
        """Halve."""
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    assert halve(4) == 2
    for number in (3, 5):
        with pytest.raises(GenerationError, match=f"Could not halve: ValueError: {number} is odd"):
            halve(number)
    assert halve(6) == 3
    assert halve.__doc__ == "Halve."


def http_error(status: int, headers: dict[str, str] | None = None) -> urllib.error.HTTPError:
    message = Message()
    for name, value in (headers or {}).items():
        message[name] = value
    return urllib.error.HTTPError("http://127.0.0.1/", status, "…", message, None)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_http_errors_that_pass_are_transient(status: int) -> None:
    assert is_transient(http_error(status))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_http_errors_that_stay_are_not_transient(status: int) -> None:
    assert not is_transient(http_error(status))


def test_timeouts_and_refusals_of_http_libraries_are_transient() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
    for ask in (urllib.request.urlopen, requests.get, httpx2.get):
        with pytest.raises(Exception) as caught:
            ask(closed, timeout=1)
        assert is_transient(caught.value), caught.value
    assert is_transient(httpx2.ReadTimeout("late"))
    assert is_transient(requests.exceptions.ReadTimeout("late"))


def test_the_wait_that_a_server_asks_for_is_read_from_a_foreign_error() -> None:
    assert wait_asked_for(http_error(429, {"Retry-After": "7"})) == 7.0
    assert wait_asked_for(http_error(429)) is None
    assert wait_asked_for(ValueError()) is None
