"""Processes that begin with torch imported, because that takes longer than what most of them are for.

Each is a fork of one process that has imported it and does nothing else. Not for tests of how a program starts and
ends, of what it imports, or of the memory that it takes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
PROCESSES.set_forkserver_preload(["torch", "loadstone.model", "loadstone.sources"])
PATIENCE = 120  # seconds


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    code: int
    out: str
    err: str


def command(*arguments: str, folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run the program with these arguments, in a folder, where what it says is put too."""
    process = PROCESSES.Process(target=_main, args=(arguments, folder, dict(environment)))
    process.start()
    process.join(PATIENCE)
    code = process.exitcode
    process.kill()
    assert code is not None, f"{arguments} did not end within {PATIENCE} s"
    return Ended(code, *((folder / name).read_text(encoding="utf-8") for name in ("out", "err")))


def _main(arguments: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, descriptor in (("out", 1), ("err", 2)):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    from loadstone.cli import main

    main(arguments)
