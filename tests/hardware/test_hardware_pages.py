"""Which pages a process has is what the system says, page by page."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from loadstone.hardware import resident_bytes

PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")


def _place(memory: mmap.mmap) -> tuple[int, int]:
    array = np.frombuffer(memory, dtype=np.uint8)
    return array.ctypes.data, array.nbytes


def test_memory_counts_when_it_was_touched() -> None:
    memory = mmap.mmap(-1, 64 * PAGE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    place = _place(memory)
    assert resident_bytes([place]) == 0
    memory[3 * PAGE : 5 * PAGE] = b"x" * (2 * PAGE)
    assert resident_bytes([place]) == 2 * PAGE


def test_a_page_counts_once() -> None:
    """Places may overlap, touch, be empty and come in any order."""
    memory = mmap.mmap(-1, 8 * PAGE)
    memory[:] = b"x" * (8 * PAGE)
    start, _ = _place(memory)
    places = [(start + 4 * PAGE, PAGE), (start, 10), (start + 100, PAGE), (start + PAGE, 0), (start + 4 * PAGE + 1, 1)]
    assert resident_bytes(places) == 3 * PAGE


def test_a_file_counts_when_this_process_has_touched_it(tmp_path: Path) -> None:
    """Not when only the system's cache has it."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 64 * PAGE)
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    place = _place(memory)
    assert resident_bytes([place]) == 0
    assert memory[0] == ord("x")
    assert PAGE <= (resident_bytes([place]) or 0) <= 64 * PAGE
    memory.madvise(mmap.MADV_DONTNEED)
    assert resident_bytes([place]) == 0


def test_a_system_that_does_not_say_is_none(tmp_path: Path) -> None:
    assert resident_bytes([(0, PAGE)], proc_root=tmp_path) is None
