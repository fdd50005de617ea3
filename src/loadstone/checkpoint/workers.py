"""A few threads that read and compute: while some wait for the disk, others use the cores.

Each has one buffer, so memory is bounded by their number. Knows nothing of what they do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Generic, TypeVar

from .disk import Buffer

if TYPE_CHECKING:
    import torch

Task = TypeVar("Task")

# Enough reads at once to keep a fast disk busy beside as many threads as there are cores that compute.
WAITING = 6
MOST_THREADS = 16


def thread_count() -> int:
    """Return how many threads read and compute at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + WAITING, MOST_THREADS)


def in_threads(
    tasks: Iterable[Task], work: Callable[[Task, Buffer], None], *, buffer_bytes: int, is_pinned: bool = False,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:  # fmt: skip
    """Call `work(task, buffer)` for each task, which are begun in their order; return when all are done.

    `around` makes what each thread runs in. The first error ends the work and is raised here, as is an interrupt: no
    thread is left when this returns or raises.
    """
    shared = _Shared(iter(tasks), work, around, lambda: Buffer(buffer_bytes, is_pinned=is_pinned))
    count = thread_count()
    with ThreadPoolExecutor(count, thread_name_prefix="loadstone-load") as pool:
        futures = [pool.submit(shared.run) for _ in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            shared.is_over.set()
    for future in done:
        future.result()


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return what a thread runs in whose copies to `device` are to overlap with others': a stream of its own."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _Shared(Generic[Task]):
    """What the threads have in common.

    A class and no closure: the frames of an error keep their functions and so what these enclose, even when cleared.
    """

    def __init__(
        self, tasks: Iterator[Task], work: Callable[[Task, Buffer], None],
        around: Callable[[], AbstractContextManager[object]], new_buffer: Callable[[], Buffer],
    ) -> None:  # fmt: skip
        self.is_over = threading.Event()
        self._tasks, self._work, self._around, self._new_buffer = tasks, work, around, new_buffer
        self._lock = threading.Lock()

    def run(self) -> None:
        """Work until there is no task left, or it is over."""
        buffer: Buffer | None = None
        with self._around():
            while not self.is_over.is_set():
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                buffer = buffer or self._new_buffer()
                self._work(task, buffer)
