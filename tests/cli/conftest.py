"""The command line as a test uses it: in this process, or as a process of its own where signals and pipes matter."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loadstone.cli import main

Start = Callable[..., "subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, new_home: Callable[[Path], Path]) -> Path:
    """One home for all tests here, with nobody's configuration."""
    return new_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, and none of the machine's settings."""
    for name in os.environ:
        if name.startswith(("LOADSTONE_", "HF_", "TRANSFORMERS_")) or name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name)
    for name in ("LOADSTONE_HOME", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("loadstone")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield tmp_path
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1], before[2]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a command in this process, with `stdin` as its standard input."""

    def run(*arguments: str, stdin: str | bytes = "") -> Ended:
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        out, err = capsys.readouterr()
        return Ended(int(end.value.code or 0), out, err)

    return run


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command as a process of its own; it is killed at the end of the test if it still runs.

    It hears Ctrl-C also where the tests themselves were started without, as in the background of a shell.
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "loadstone", *arguments]
        started.append(subprocess.Popen(command, preexec_fn=_hear_interrupts, **{**pipes, **more}))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()


@pytest.fixture
def store_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own, not made yet."""
    monkeypatch.setenv("LOADSTONE_STORE__FOLDER", str(tmp_path / "store"))
    return tmp_path / "store"
