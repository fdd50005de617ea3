"""Reads a process's memory from /proc, with the standard library alone: a measurement must not add to what it finds.

What is not there (elsewhere than on Linux, or when the process has ended) is None. Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def anonymous_bytes(process: int | str = "self", *, proc: Path = PROC) -> int | None:
    """Return the memory that a process has now and no file backs."""
    return _table(proc / str(process) / "status").get("RssAnon")


def memory_now(*, proc: Path = PROC) -> dict[str, int | None]:
    """Return this process's resident memory, its peak, and the parts that are private and anonymous.

    Private is what no other process has mapped, files included: it has pages of weights that only this one reads.
    """
    status = _table(proc / "self" / "status")
    parts = _table(proc / "self" / "smaps_rollup")
    return {
        "peak_rss_bytes": status.get("VmHWM"),
        "rss_bytes": status.get("VmRSS"),
        "private_bytes": _sum(parts.get(name) for name in ("Private_Clean", "Private_Dirty")),
        "anonymous_bytes": parts.get("Anonymous"),
    }


def _sum(parts: Iterable[int | None]) -> int | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def _table(file: Path) -> dict[str, int]:
    """Return the lines of the form "Name:   123 kB"."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {one[0].rstrip(":"): int(one[1]) * 1024 for one in words if len(one) == 3 and one[2] == "kB"}
