"""What is under way, as bars on standard error while it lasts; nothing where that is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.telemetry import Event, subscribe

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def shown_progress(waiting: str) -> Iterator[None]:
    """Show `waiting` while the block runs, and bars for what events say of downloads and loads.

    Everything is wiped away at the end. A log on the terminal is shown instead of bars when somebody asked for it.
    """
    if not _is_wanted():
        yield
        return
    with _bars() as progress:
        unsubscribe = subscribe(_Bars(progress, waiting))
        try:
            yield
        finally:
            unsubscribe()


def _is_wanted() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("LOADSTONE_LOG")


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    # Standard output is left alone: what goes there is the answer.
    return Progress(
        *columns, Speed(), TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True,
        redirect_stdout=False, redirect_stderr=True,
    )  # fmt: skip


class _Bars:
    """Turns events into bars, one for each file that arrives and one for the load."""

    def __init__(self, progress: Progress, waiting: str) -> None:
        self._progress = progress
        self._waiting: TaskID | None = progress.add_task(waiting, total=None)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.name == "download.progress":
            self._update(f"Fetching {event.fields['file']}", event)
        elif event.name == "load.progress":
            self._update("Loading", event)

    def _update(self, name: str, event: Event) -> None:
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None
        total, done = event.fields["total"], event.fields["done"]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], total=total, completed=done)
