"""What a first load does after it is ready: write what was quantised into the store, beside the first answers.

Reading and writing at the same time would share the disk, and the load would wait for both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from loadstone.store import Entry, StoreUnavailableError
from loadstone.telemetry import emit


class CancelledError(Exception):
    """Nobody wants what was being written."""


class Publishing:
    """A thread that makes an entry; the process does not end before it has."""

    def __init__(self, publish: Callable[[Callable[[], None]], Entry], *, folder: str) -> None:
        """Start `publish`; it is given a function to call between its steps, which raises when it is cancelled.

        `publish` cleans up whatever happens. When it raises StoreUnavailableError a `store.warning` says why.
        """
        self.entry: Entry | None = None
        self._publish, self._folder = publish, folder
        self._is_cancelled, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="loadstone-publish")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the entry is made, or could not be; an interrupt while waiting cancels it and is passed on."""
        try:
            self._is_over.wait()  # `join` takes a thread for ended when it is interrupted (Python 3.11)
        except BaseException:
            self._is_cancelled.set()
            self._is_over.wait()
            raise

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._is_over.is_set()

    def _run(self) -> None:
        publish, self._publish = self._publish, _nothing  # what it holds goes with it
        try:
            self.entry = publish(self._check)
        except CancelledError:
            emit("store.cancelled", folder=self._folder)
        except StoreUnavailableError as error:
            reason = f"the quantised weights are not kept: {error}"
            emit("store.warning", reason=reason, file=self._folder, cause=str(error))
        finally:
            self._is_over.set()

    def _check(self) -> None:
        if self._is_cancelled.is_set():
            raise CancelledError


def _nothing(_: Callable[[], None]) -> Entry:
    raise CancelledError
