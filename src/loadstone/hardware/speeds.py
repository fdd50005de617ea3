"""How fast this machine reads its memory, multiplies, and reads a disk: measured in a moment, and remembered.

What was measured is kept in the cache folder under the processor's name, its abilities and its cores, and measured
anew after a month. Another program that works meanwhile makes figures too low, never too high: then they are measured
anew after an hour.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from loadstone.folders import cache_folder
from loadstone.telemetry import emit
from loadstone.units import format_age

from .device import Device
from .limits import memory_limits

GOOD_FOR, GOOD_FOR_BUSY = 30 * 86_400, 3600
"""Seconds; firmware, memory modules and neighbours of a virtual machine change. The second where others worked."""

MEASURED = "measured here"
LEAST_READ, MOST_READ, READ_A_CORE = 192 << 20, 1 << 30, 48 << 20  # bytes: more than processors keep of it themselves
SIDE, STACK = 64, 1000  # rows and columns of a product, and how many
DISK_READ, DISK_PIECE, DISK_THREADS = 96 << 20, 8 << 20, 4
BUSY_SECONDS = 0.05  # how long it is looked whether others work
LONGEST = 0.08  # seconds for each of the figures, beside making the numbers


@dataclass(frozen=True)
class Figure:
    """A rate a second, and where it is from; `is_peak` says that it is a maker's, which nothing quite reaches."""

    value: float
    source: str
    is_peak: bool = False

    @property
    def is_measured(self) -> bool:
        """Tell whether it was measured on this machine."""
        return self.source.startswith(MEASURED)


@dataclass(frozen=True)
class Speeds:
    """Bytes read from memory, operations of products, and bytes read from disk, a second; None where not known."""

    memory: Figure | None = None
    products: Figure | None = None
    disk: Figure | None = None


def machine_speeds(device: Device, file: Path | None = None) -> Speeds:
    """Return the speeds of this machine's processor; of another kind of device only the disk's is known.

    `file` is one on the disk in question, or a folder, whose disk may have been measured with a file earlier. What is
    not remembered is measured: a fifth of a second for each of the three.
    """
    known = _Remembered(cache_folder() / "speeds.json")
    disk = _disk(known, file)
    if device.kind != "cpu":
        return Speeds(disk=disk)
    key = "; ".join((device.name, f"{device.cores} cores", *sorted(device.capabilities)))
    figures = known.get(key, "memory", "products")
    if figures is None:
        is_busy = _is_busy()
        found = measure(device.cores)
        figures = known.put(key, {**found, "busy": 1.0} if is_busy else found)
    busy = ", while other programs worked" if figures.get("busy") else ""
    said = f"{MEASURED} {format_age(time.time() - figures['measured'])}{busy}"
    return Speeds(Figure(figures["memory"], said), Figure(figures["products"], said), disk)


def measure(cores: int) -> dict[str, float]:
    """Return bytes a second that `cores` threads read from memory, and operations a second of a float32 product."""
    started = time.perf_counter()
    found = {"memory": _measure_memory(cores), "products": _measure_products(cores)}
    emit("hardware.measured", **found, seconds=time.perf_counter() - started)
    return found


def _measure_memory(cores: int) -> float:
    import numpy as np

    most = max(cores * 4096, min(MOST_READ, memory_limits().free_bytes // 8))
    size = min(max(LEAST_READ, READ_A_CORE * cores), most)
    parts = [np.ones(size // cores // 8, np.int64) for _ in range(cores)]  # written, or all pages would be one
    with ThreadPoolExecutor(cores) as pool:
        seconds = _shortest(lambda: list(pool.map(np.max, parts)))
    return sum(part.nbytes for part in parts) / seconds


def _measure_products(cores: int) -> float:
    """Return the rate of one core, times the cores; as many as there are would wait for one that works for others.

    Small matrices are multiplied in one thread, at the rate of large ones.
    """
    import numpy as np

    stack = np.ones((STACK, SIDE, SIDE), np.float32)
    result = np.empty_like(stack)
    seconds = _shortest(lambda: np.matmul(stack, stack, out=result))
    return cores * 2 * SIDE**3 * STACK / seconds


def _shortest(action: Callable[[], object]) -> float:
    """Return the seconds of the quickest of a few times, the first of which only warms up."""
    action()
    end = time.perf_counter() + LONGEST
    best = float("inf")
    while best == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def _is_busy() -> bool:
    """Tell whether other programs have a quarter of the processors' time just now."""
    return psutil.cpu_percent(BUSY_SECONDS) > 25


def _disk(known: _Remembered, file: Path | None) -> Figure | None:
    """Return how fast the disk with `file` is read, or None where that cannot be found out quickly."""
    if file is None:
        return None
    try:
        key = f"disk {os.stat(file).st_dev}"
        figures = known.get(key, "disk")
        if figures is None:
            rate = measure_disk(file) if file.is_file() else None
            if rate is None:
                return None
            figures = known.put(key, {"disk": rate})
    except OSError:
        return None
    return Figure(figures["disk"], f"{MEASURED} {format_age(time.time() - figures['measured'])}")


def measure_disk(file: Path) -> float | None:
    """Return the bytes a second that a few threads read of `file` past the page cache; None where nothing can.

    Reads the middle of the file, a tenth of a gigabyte at most.
    """
    flags = getattr(os, "O_DIRECT", 0)
    size = os.stat(file).st_size
    if not flags or not hasattr(os, "preadv") or size < 2 * DISK_PIECE:
        return None
    count = min(DISK_READ, size) // DISK_PIECE
    first = (size - count * DISK_PIECE) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        descriptor = os.open(file, os.O_RDONLY | flags)
    except OSError:
        return None  # a file system that has only the page cache, such as one in memory
    try:
        buffers = [mmap.mmap(-1, DISK_PIECE) for _ in range(count)]

        def read(number: int) -> int:
            return os.preadv(descriptor, [buffers[number]], first + number * DISK_PIECE)

        with ThreadPoolExecutor(DISK_THREADS) as pool:
            started = time.perf_counter()
            total = sum(pool.map(read, range(count)))
            return total / (time.perf_counter() - started)
    except OSError:
        return None
    finally:
        os.close(descriptor)


class _Remembered:
    """Figures by a key, in one small file; a file that cannot be read or written is as good as none."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, key: str, *names: str) -> dict[str, float] | None:
        """Return what was measured, with figures of these names, unless that is too long ago."""
        figures = self._all().get(key)
        if not isinstance(figures, dict) or not all(_is_good(figures.get(name)) for name in (*names, "measured")):
            return None
        age = time.time() - figures["measured"]
        return figures if 0 <= age <= (GOOD_FOR_BUSY if figures.get("busy") else GOOD_FOR) else None

    def put(self, key: str, figures: dict[str, float]) -> dict[str, float]:
        """Remember `figures`, and return them with the time."""
        timed = {**figures, "measured": time.time()}
        beside = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({**self._all(), key: timed}, indent=1), encoding="utf-8")
            os.replace(beside, self._file)
        return timed

    def _all(self) -> dict[str, Any]:
        try:
            content = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def _is_good(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e18
