"""Runs the benchmarks' modules, each in a process of its own, and returns what it printed.

Knows when the process was started and how much anonymous memory it had at most; not what it measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from .process_memory import anonymous_bytes

WATCH_S = 0.02  # between two looks at a process's memory
LAST_WORDS = 3000  # characters of a failed process's errors that are worth telling


class ModuleFailed(Exception):
    """A module's process ended with an error; the text has what it said last."""


@dataclass(frozen=True)
class Run:
    """What one process printed, when it began and ended (`time.monotonic`), and its most anonymous memory in bytes."""

    found: Mapping[str, Any]
    spawned: float
    ended: float
    peak_anonymous_bytes: int | None


def run_module(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, python: str | None = None
) -> dict[str, Any]:
    """Run a module in a fresh process and return the JSON of its last line; raise ModuleFailed when it fails.

    `environment` are its variables, and `python` another interpreter than this one's.
    """
    return dict(run_watched(module, *arguments, environment=environment, python=python).found)


def run_watched(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, python: str | None = None
) -> Run:
    """Run a module like `run_module`, and watch its memory from outside.

    Whatever ends the waiting (Ctrl-C too) ends the process.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        command = [python or sys.executable, "-m", module, *arguments]
        spawned = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        try:
            peak = _watch(process)
        finally:
            process.kill()  # nothing when it has ended by itself
            process.wait()
            ended = time.monotonic()
        if process.returncode != 0:
            raise ModuleFailed(f"{module} failed ({process.returncode}):\n{_text(errors)[-LAST_WORDS:]}")
        return Run(_last_line(module, _text(out)), spawned, ended, peak)


def check_imports(statement: str, *, python: str | None = None) -> None:
    """Run import statements in a fresh process, to bring their files into memory; raise ModuleFailed when they fail."""
    command = [python or sys.executable, "-c", statement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModuleFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{statement!r} failed")


def _watch(process: subprocess.Popen[bytes]) -> int | None:
    """Wait for the end of a process; return the most anonymous memory that it was seen to have."""
    peak: int | None = None
    while process.poll() is None:
        seen = anonymous_bytes(process.pid)
        peak = peak if seen is None else max(seen, peak or 0)
        time.sleep(WATCH_S)
    return peak


def _last_line(module: str, printed: str) -> Mapping[str, Any]:
    lines = printed.strip().splitlines() or [""]
    try:
        found: Mapping[str, Any] = json.loads(lines[-1])
    except ValueError:
        raise ModuleFailed(f"{module} printed no JSON at its end: {lines[-1][:200]!r}") from None
    return found


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")
