"""Which pages of memory this process really has: what was asked of the system is not what it has given yet.

Linux tells page by page; elsewhere nobody does. Knows addresses, and nothing of what is there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from ._cgroups import PROC_ROOT

_ENTRY = 8  # bytes that /proc/self/pagemap has for a page; the highest bit says whether it is in memory
_IS_PRESENT = bytes(byte >> 7 for byte in range(256))
_AT_A_TIME = 1 << 16  # pages


def resident_bytes(places: Iterable[tuple[int, int]], *, proc_root: Path = PROC_ROOT) -> int | None:
    """Return how many bytes at `places` (addresses and lengths) are pages of this process now, each page whole.

    A page of a mapped file counts when this process has it, not when only the system's cache does. None where the
    system does not say.
    """
    if sys.platform != "linux":
        return None
    size = os.sysconf("SC_PAGE_SIZE")
    try:
        with (proc_root / "self" / "pagemap").open("rb", buffering=0) as table:
            return size * sum(_present(table.fileno(), first, last) for first, last in _pages(places, size))
    except OSError:
        return None


def _pages(places: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the pages [first, last) of all places, none of them twice."""
    found: list[tuple[int, int]] = []
    for start, length in sorted(places):
        if length <= 0:
            continue
        first, last = start // size, -(-(start + length) // size)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _present(table: int, first: int, last: int) -> int:
    count = 0
    for page in range(first, last, _AT_A_TIME):
        wanted = min(_AT_A_TIME, last - page) * _ENTRY
        said = os.pread(table, wanted, page * _ENTRY)
        if len(said) < wanted:
            raise OSError(f"page {page} is not told of")
        # The last of the eight bytes is the highest: Linux runs little-endian wherever torch does.
        count += said[_ENTRY - 1 :: _ENTRY].translate(_IS_PRESENT).count(1)
    return count
