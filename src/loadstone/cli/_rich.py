"""The one place that calls rich: bars for what has a size, a spinner for what has none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class _WhenSized(ProgressColumn):
    """Another column, left empty while nobody knows how much there is to do."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return "" if task.total is None else self._column(task)


BYTES = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
TOKENS = (TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"), TimeRemainingColumn())


class Bars:
    """Bars on standard error, by name; wiped away at the end. Safe to use from several threads.

    Until something is known there is a spinner beside `waiting`, where that is given. `sized` says how sizes are told.
    """

    def __init__(self, waiting: str | None = None, sized: Sequence[ProgressColumn] = BYTES) -> None:
        # Standard output is left alone: what goes there is the answer.
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
            *map(_WhenSized, sized), console=Console(file=sys.stderr), transient=True,
            redirect_stdout=False, redirect_stderr=True,
        )  # fmt: skip
        self._waiting = None if waiting is None else self._progress.add_task(waiting, total=None)
        self._tasks: dict[str, TaskID] = {}

    def shown(self) -> AbstractContextManager[object]:
        """Return the context in which the bars are shown."""
        return self._progress

    def update(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes or tokens of `name` are done."""
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], total=total, completed=done)
