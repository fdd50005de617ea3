"""A few threads that read and compute: while some wait for the disk, others use the cores.

Each has one buffer, so memory is bounded by their number. Knows nothing of what they do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from .disk import Buffer

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
    source, lock, is_over = iter(tasks), threading.Lock(), threading.Event()
    nothing = object()

    def run() -> None:
        buffer: Buffer | None = None
        with around():
            while not is_over.is_set():
                with lock:
                    task = next(source, nothing)
                if task is nothing:
                    return
                buffer = buffer or Buffer(buffer_bytes, is_pinned=is_pinned)
                work(task, buffer)  # type: ignore[arg-type]

    count = thread_count()
    with ThreadPoolExecutor(count, thread_name_prefix="loadstone-load") as pool:
        futures = [pool.submit(run) for _ in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            is_over.set()
    for future in done:
        future.result()
