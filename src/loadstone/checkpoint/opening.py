"""Bytes of a file, wherever it is: on this machine's disk, or at a Hub that sends parts of files.

Readers of headers ask for stretches and know no more of a file than its size.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Protocol


class Readable(Protocol):
    """A file that gives its bytes in stretches."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), fewer where the file ends before."""


class LocalFile:
    """A file on this machine, open as long as the block; what goes wrong is an OSError."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("rb")
        self.size = self._stream.seek(0, 2)

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), fewer where the file ends before."""
        self._stream.seek(start)
        return self._stream.read(length)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
