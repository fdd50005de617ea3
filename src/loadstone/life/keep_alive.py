"""The thread that lets an idle model go. It sleeps until that may be due, and ends with the model or its owner."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from .tenure import Tenure

Release = Callable[[Tenure], object]


def let_go_when_idle(tenure: Tenure, release: Release, owner: object, releasing: threading.RLock) -> None:
    """Start the thread: it calls `release`, a method of `owner`, once nobody has asked anything for `keep_alive`.

    `release` looks once more, holding `releasing`. The owner is not kept alive. Neither it nor the interpreter ends in
    the middle of a release: a thread that is in C++ code then aborts the process.
    """
    ending = weakref.finalize(owner, _end, tenure.is_over, tenure.was_used, releasing)
    work = (weakref.ref(tenure), weakref.WeakMethod(release), tenure.is_over, tenure.was_used, ending)
    threading.Thread(target=_run, args=work, name="loadstone-keep-alive", daemon=True).start()


def _end(is_over: threading.Event, was_used: threading.Event, releasing: threading.RLock) -> None:
    is_over.set()
    was_used.set()
    with releasing:
        pass


def _run(
    tenure: weakref.ref[Tenure], release: weakref.WeakMethod[Release], is_over: threading.Event,
    was_used: threading.Event, ending: weakref.finalize[..., object],
) -> None:  # fmt: skip
    """Wait and release in turn; nothing of the model is held while waiting."""
    while not is_over.is_set():
        seconds = _seconds_left(tenure)
        if seconds is None:
            was_used.wait()  # or a model that leaves as soon as it is idle would never be asked
        elif not is_over.wait(max(0.0, seconds)):
            _call(release, tenure)
    ending.detach()


def _seconds_left(reference: weakref.ref[Tenure]) -> float | None:
    """Return how long to wait, once no answer is made; None as long as nobody has asked and that is waited for."""
    tenure = reference()
    if tenure is None or (tenure.keep_alive == 0 and not tenure.was_used.is_set()):
        return None
    left = tenure.seconds_left()
    while left is None and not tenure.is_over.is_set():
        tenure.wait_until_idle()
        left = tenure.seconds_left()
    return left or 0.0


def _call(release: weakref.WeakMethod[Release], reference: weakref.ref[Tenure]) -> None:
    tenure, method = reference(), release()
    if tenure is not None and method is not None:
        method(tenure)
