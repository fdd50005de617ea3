"""Weights that are looked at without being fetched: their beginnings, where the headers are, a piece at a time.

Knows that headers stand at the beginning of files, not what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loadstone.errors import CheckpointError
from loadstone.units import format_size

from .base import ModelFiles, RemoteFile

FIRST = 16 * 2**10
"""Bytes that are read of each file at once: the header of a usual shard is shorter."""

LARGEST = 64 * 2**20
"""Bytes that one file's headers may have: a vocabulary in GGUF takes a tenth of it."""

AT_ONCE = 8  # requests, where a model has many shards

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Headers:
    """The files of a model as far as they are read to know it.

    `remote` gives the bytes of those weights that are not on this machine, `file_bytes` is what all weights take, and
    `missing_bytes` what a load would have to fetch first.
    """

    files: ModelFiles
    remote: Mapping[Path, RemoteWeights]
    file_bytes: int
    missing_bytes: int

    @classmethod
    def of_local(cls, files: ModelFiles) -> Headers:
        """Return the headers of files that are all here."""
        return cls(files, MappingProxyType({}), sum(file.stat().st_size for file in files.weights), 0)


class RemoteWeights:
    """One file of weights at a Hub; its beginning is kept as far as it was read.

    `fetch` returns a stretch, given its start and length; it is called anew for what lies elsewhere in the file.
    """

    def __init__(self, file: RemoteFile, fetch: Read) -> None:
        self.size = file.size
        self.arrived = 0
        self._file, self._fetch = file, fetch
        self._beginning = b""

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length), fewer where the file ends before."""
        end = min(start + length, self.size)
        if start > len(self._beginning) + FIRST:
            return self._stretch(start, end)
        if end > len(self._beginning):
            # Some more than is asked for, since a header is asked for in many small pieces.
            wanted = min(self.size, max(end, FIRST))
            self._beginning += self._stretch(len(self._beginning), wanted)
        return self._beginning[start:end]

    def _stretch(self, start: int, end: int) -> bytes:
        if end <= start:
            return b""
        if self.arrived + end - start > LARGEST:
            raise CheckpointError(
                f"its header is larger than {format_size(LARGEST)}, which is not believed before it is fetched",
                file=self._file.name,
            )
        found = self._fetch(start, end - start)
        self.arrived += len(found)
        return found


def read_beginnings(weights: Collection[RemoteWeights]) -> None:
    """Read the beginnings of all files, a few at the same time."""
    if not weights:
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(weights)), "loadstone-headers") as pool:
        for _ in pool.map(lambda one: one.read(0, FIRST), weights):
            pass
