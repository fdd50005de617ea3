"""How fast the disk gives a file when nothing is kept in memory: the ceiling of a load with a cold page cache.

Reads past the page cache (O_DIRECT), several threads at a time. A virtual disk's host may still keep what it read.
"""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 4
BUFFER_BYTES = 16 << 20
LONGEST_BYTES = 2 << 30  # of a file, which are read


def direct_read_rate(file: Path) -> float | None:
    """Return the bytes a second at which `file`, or a part of it, is read; None where it cannot be read so."""
    try:
        return _read(file)
    except OSError:  # a file system without direct reads, such as one in memory
        return None


def _read(file: Path) -> float:
    """Read whole buffers of a file, each thread every fourth, and return bytes a second."""
    whole = min(file.stat().st_size, LONGEST_BYTES) // BUFFER_BYTES
    if not whole:
        raise OSError(f"{file.name} is smaller than one buffer")
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            started = time.perf_counter()
            done = sum(threads.map(lambda first: _read_every(descriptor, range(first, whole, THREADS)), range(THREADS)))
            return done / (time.perf_counter() - started)
    finally:
        os.close(descriptor)


def _read_every(descriptor: int, numbers: range) -> int:
    """Read the buffers of these numbers and return their bytes."""
    with mmap.mmap(-1, BUFFER_BYTES) as buffer:  # aligned to a page, as direct reads want it
        return sum(os.preadv(descriptor, [buffer], number * BUFFER_BYTES) for number in numbers)
