"""Locks between processes: one maker of an entry at a time, and no removal of an entry that somebody uses.

The system gives a lock back when its process ends, however it ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path

from loadstone.telemetry import emit

POLL_SECONDS = 0.05


@contextmanager
def exclusive(file: Path, *, about: str) -> Iterator[None]:
    """Hold the lock `file`, waiting for it as long as it takes; `about` says to a person what is waited for.

    It may be given back by another thread than took it. Raises OSError where no lock can be made.
    """
    with file.open("a+b") as stream:
        is_told = False
        while not _try_to_lock(stream):
            if not is_told:
                emit("store.waiting", about=about)
                is_told = True
            time.sleep(POLL_SECONDS)
        yield  # closing the file gives the lock back


def is_free(file: Path) -> bool:
    """Tell whether nobody holds the lock `file` now."""
    if not file.exists():
        return True
    with file.open("a+b") as stream:
        return _try_to_lock(stream)


def _try_to_lock(stream: BufferedRandom) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            stream.seek(0)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # Windows says the latter
        return False
    return True


def open_in_use(file: Path) -> BufferedReader:
    """Open `file` for reading; until it is closed, `open_alone` of any process fails on it.

    On Windows a file that is open cannot be removed, which is all that this is for.
    """
    stream = file.open("rb")
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(stream.fileno(), fcntl.LOCK_SH)
    return stream


def open_alone(file: Path) -> BufferedReader | None:
    """Open `file` for reading unless somebody has it in use; None then."""
    stream = file.open("rb")
    if sys.platform == "win32":
        return stream
    import fcntl

    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in `folder`; does nothing where folders cannot be synchronised."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
