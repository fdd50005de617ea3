"""Runs a program within a limit that the kernel holds: a control group of its own, or where none can be made, ulimit.

A process that goes over the group's limit is killed; one that goes over ulimit's is refused memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
PATIENCE_S = 240


def run_within(limit: int, script: Path, task: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a script with a task as JSON in a process that may have `limit` bytes; return how it ended.

    Workers of a test run do so one after the other.
    """
    with _in_turn(), _limited(limit) as enter:
        return subprocess.run(
            [sys.executable, str(script), json.dumps(task)], capture_output=True, text=True, check=False,
            timeout=PATIENCE_S, preexec_fn=enter,
        )  # fmt: skip


@contextmanager
def _in_turn() -> Iterator[None]:
    """Hold a lock that all workers of a run share."""
    import fcntl

    with Path(os.environ["LOADSTONE_HOME"], "within.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _limited(limit: int) -> Iterator[Callable[[], None]]:
    """Yield what a process calls to be limited."""
    group = _new_group(limit)
    if group is None:
        yield lambda: _limit_data(limit)
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def _new_group(limit: int) -> Path | None:
    """Return a new control group with a limit, or None where none can be made."""
    for parent, file in ((VERSION_1, "memory.limit_in_bytes"), (VERSION_2, "memory.max")):
        group = parent / f"loadstone-test-{uuid.uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(limit))
        except OSError:
            group.rmdir()
            continue
        return group
    return None


def _limit_data(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
