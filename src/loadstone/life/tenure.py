"""A model's time in memory: which calls have it now, and how long nobody has asked anything of it."""

from __future__ import annotations

import threading
import time

from loadstone.loaded import LoadedModel


class Tenure:
    """A model that is in memory; `model` is None as soon as it is on its way out.

    `keep_alive` are the seconds that it stays without a request, None for ever. `gate` guards all that changes here.
    """

    def __init__(self, model: LoadedModel, keep_alive: float | None, gate: threading.Condition) -> None:
        self.model: LoadedModel | None = model
        self.keep_alive = keep_alive
        self.is_over = threading.Event()
        self.was_used = threading.Event()
        self._gate = gate
        self._leases = 0
        self._used = time.monotonic()

    def begin(self) -> None:
        """Have the model for a call, until `end`; the gate is held."""
        self._leases += 1

    def end(self) -> None:
        """Let go of it."""
        with self._gate:
            self._leases -= 1
            self._used = time.monotonic()
            self._gate.notify_all()
        self.was_used.set()

    def wait_for_leases(self) -> None:
        """Return when no call has the model."""
        with self._gate:
            self._gate.wait_for(lambda: self._leases == 0)

    def wait_until_idle(self) -> None:
        """Return when no call has the model and no answer is made, as far as can be seen now."""
        self.wait_for_leases()
        if (model := self.model) is not None:
            model.engine.wait_until_idle()

    def seconds_left(self) -> float | None:
        """Return how much longer the model stays if nobody asks; None while it is in use, or stays for ever."""
        model, keep_alive = self.model, self.keep_alive
        if model is None or keep_alive is None:
            return None
        with self._gate:
            since = None if self._leases else model.engine.idle_since
            return None if since is None else max(since, self._used) + keep_alive - time.monotonic()

    def close(self) -> None:
        """Say that it is over, to whoever waits for that."""
        self.is_over.set()
        self.was_used.set()
