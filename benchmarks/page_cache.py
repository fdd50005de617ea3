"""Puts files out of the page cache or into it, and says how much of them is there. Linux only.

Eviction is asked for, not ordered: the kernel keeps what is mapped or being written, so the share that stayed is
always returned. `mincore` tells the truth only about files that this user may write.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WINDOW_BYTES = 1 << 24  # looked at in one go
EVICTED_SHARE = 0.01  # a file with more of it still in memory is not called cold
_TRIES = 5
_LIBRARY = ctypes.CDLL(None, use_errno=True)


def evict(files: Sequence[Path]) -> float:
    """Put files out of the page cache and return the share of their bytes that stayed, 0.0 to 1.0."""
    share = 0.0
    for _ in range(_TRIES):
        for file in files:
            with _opened(file) as descriptor:
                os.fsync(descriptor)  # a page that is not on the disk yet cannot be given up
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        share = resident_share(files)
        if share <= EVICTED_SHARE:
            break
        time.sleep(0.1)  # pages on their way between the kernel's lists are not given up
    return share


def warm(files: Sequence[Path]) -> float:
    """Read files into the page cache and return the share of their bytes that is there then."""
    buffer = bytearray(WINDOW_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as content:
            while content.readinto(buffer):
                pass
    return resident_share(files)


def resident_share(files: Sequence[Path]) -> float:
    """Return the share of the files' bytes that is in the page cache; 0.0 for no bytes at all."""
    pages = resident = 0
    for file in files:
        with _opened(file) as descriptor:
            for start, length in _windows(file):
                pages += -(-length // mmap.PAGESIZE)
                resident += _resident_pages(descriptor, start, length)
    return resident / pages if pages else 0.0


class ResidentWatch(threading.Thread):
    """Notes when all bytes of some files have been seen in the page cache.

    Looks at a window only until it is whole, so a look is cheap however large the files are.
    """

    def __init__(self, files: Sequence[Path], limit_s: float, interval_s: float = 0.02) -> None:
        super().__init__(daemon=True)
        self._files = files
        self._interval_s = interval_s
        self._end = time.monotonic() + limit_s
        self._at: float | None = None

    def run(self) -> None:
        """Go through the files, waiting at every window that is not whole yet."""
        for file in self._files:
            with _opened(file) as descriptor:
                for start, length in _windows(file):
                    while _resident_pages(descriptor, start, length) * mmap.PAGESIZE < length:
                        if time.monotonic() > self._end:
                            return
                        time.sleep(self._interval_s)
        self._at = time.monotonic()

    def whole_at(self) -> float | None:
        """Wait, and return when all was there (`time.monotonic`), or None: no files, or not within the limit."""
        self.join()
        return self._at if self._files else None


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """Give a file's descriptor, for reading, while in the block."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _windows(file: Path) -> list[tuple[int, int]]:
    size = file.stat().st_size
    return [(start, min(WINDOW_BYTES, size - start)) for start in range(0, size, WINDOW_BYTES)]


def _resident_pages(descriptor: int, start: int, length: int) -> int:
    """Return how many pages of one window are in the page cache; looking brings none in."""
    found = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    # A private mapping may be borrowed by ctypes though the file is open for reading only; nothing writes to it.
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=start) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        code = _LIBRARY.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), found)
        del first  # a borrowed mapping cannot be closed
    if code != 0:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in found)
