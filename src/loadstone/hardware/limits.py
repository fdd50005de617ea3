"""How much memory this process can really get: the least of the machine and of every control group above.

A process that goes over its container's limit is killed without a message, so the limit has to be known
first. Knows nothing of models. Everything is in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ._cgroups import CGROUP_ROOT, PROC_ROOT, groups_above, read_numbers, read_table

# Version 1 writes "no limit" as the largest multiple of a page below 2**63; no machine has this much.
NO_LIMIT_FROM = 2**60


@dataclass(frozen=True)
class CgroupLimit:
    """One control group that limits this process: its folder, its limit, and what is used in it.

    `used_bytes` leaves out the cache of files, which the kernel gives up before it refuses or kills.
    """

    path: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left in this group."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class MemoryLimits:
    """What bounds this process's memory.

    `limit_bytes` is the least of physical memory, all groups' limits and the process's own (`ulimit -v` and `-d`);
    `free_bytes` is what this process can still get on top of what it has, now.
    """

    physical_bytes: int
    available_bytes: int
    cgroups: tuple[CgroupLimit, ...]
    limit_bytes: int
    free_bytes: int

    @property
    def binding(self) -> CgroupLimit | None:
        """The group that leaves the least, or None when the machine itself does."""
        least = min(self.cgroups, key=lambda group: group.free_bytes, default=None)
        return least if least is not None and least.free_bytes < self.available_bytes else None


def memory_limits(*, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT) -> MemoryLimits:
    """Return what bounds this process's memory now.

    Where there are no control groups (macOS, Windows) the machine alone does. The two roots are for tests.
    """
    memory = psutil.virtual_memory()
    groups = []
    for version, folder in groups_above("memory", proc_root=proc_root, cgroup_root=cgroup_root):
        group = _version_2(folder) if version == 2 else _version_1(folder)
        if group is not None:
            groups.append(group)
    own = list(_own_limits(proc_root))
    return MemoryLimits(
        physical_bytes=memory.total,
        available_bytes=memory.available,
        cgroups=tuple(groups),
        limit_bytes=min([memory.total, *(group.limit_bytes for group in groups), *(limit for limit, _ in own)]),
        free_bytes=min([memory.available, *(group.free_bytes for group in groups), *(free for _, free in own)]),
    )


def _own_limits(proc_root: Path) -> Iterator[tuple[int, int]]:
    """Yield each limit of this process itself, and what is left of it."""
    if sys.platform != "linux":
        return  # elsewhere the system has them, and does not hold to them
    import resource

    used = {name: int(rest.split()[0]) * 1024 for name, rest in map(_halves, _status_lines(proc_root)) if "kB" in rest}
    for which, what in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY and what in used:
            yield limit, max(0, limit - used[what])


def _halves(line: str) -> tuple[str, str]:
    name, _, rest = line.partition(":")
    return name, rest


def _version_2(folder: Path) -> CgroupLimit | None:
    # Above memory.high the kernel stalls the process rather than kill it: as good as a limit to a load.
    limit = _least(_first(folder / "memory.max"), _first(folder / "memory.high"))
    if limit is None:
        return None
    stat = read_table(folder / "memory.stat")
    cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    used = _first(folder / "memory.current") or 0
    return CgroupLimit(str(folder), limit, max(0, used - cache))


def _version_1(folder: Path) -> CgroupLimit | None:
    stat = read_table(folder / "memory.stat")
    # The second covers parents that cannot be seen from inside a container.
    limit = _least(_first(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit"))
    if limit is None:
        return None
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    used = _first(folder / "memory.usage_in_bytes") or 0
    return CgroupLimit(str(folder), limit, max(0, used - cache))


def _first(file: Path) -> int | None:
    numbers = read_numbers(file)
    return numbers[0] if numbers else None


def _least(*limits: int | None) -> int | None:
    real = [limit for limit in limits if limit is not None and 0 <= limit < NO_LIMIT_FROM]
    return min(real, default=None)


def process_rss() -> int:
    """Return the bytes of memory this process holds now (resident set size)."""
    return int(psutil.Process().memory_info().rss)


def peak_rss(*, proc_root: Path = PROC_ROOT) -> int:
    """Return the most bytes of memory this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    # getrusage would do, but on Linux a process started by a larger one inherits that one's peak.
    for line in _status_lines(proc_root):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _status_lines(proc_root: Path) -> list[str]:
    try:
        return (proc_root / "self" / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
