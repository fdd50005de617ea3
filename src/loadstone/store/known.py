"""Digests of checkpoints' files, remembered by what the file system says of each file.

Reading 15 GB only to learn that nothing has changed would take as long as loading them. A file that has the same
path, inode, size, and times of modification and change as when it was digested has the same content: every write and
every replacement sets the time of change, which no program can set back. What this cannot see is a disk that changes
bits by itself, and that does not matter: entries were made from what was read then, and have digests of their own.

A file that was changed just before it was digested could be changed again within the same tick of the clock: its
digests are used, but not remembered.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadstone._blake3 import digest
from loadstone.checkpoint.spec import ModelSpec
from loadstone.telemetry import emit

TICK_NS, COARSE_TICK_NS = 100_000_000, 2_000_000_000  # of file systems that tell parts of a second, and of the others


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file; times in nanoseconds."""

    path: str
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Look at `file`, through links."""
        path = os.path.realpath(file)
        found = os.stat(path)
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_settled(self, at_ns: int) -> bool:
        """Tell whether a change after `at_ns` would show."""
        latest = max(self.modified_ns, self.changed_ns)
        tick = TICK_NS if self.changed_ns % 1_000_000 else COARSE_TICK_NS
        return latest + tick < at_ns


@dataclass(frozen=True)
class Look:
    """The state of all files of a checkpoint, and when it was taken."""

    files: tuple[FileState, ...]
    at_ns: int

    @classmethod
    def at(cls, spec: ModelSpec) -> Look:
        """Look at the files of `spec` now."""
        now = time.time_ns()
        files = sorted({file for tensor in spec.tensors.values() for file in tensor.files})
        return cls(tuple(map(FileState.of, files)), now)


class KnownFiles:
    """Remembers in `folder` which digests the tensors in a file have, one record a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def digests(self, spec: ModelSpec, look: Look) -> dict[str, str] | None:
        """Return the digest of every tensor, or None unless all files are as they were when digested."""
        found: dict[str, str] = {}
        for state in look.files:
            record = self._read(state)
            if record is None:
                return None
            found.update(record)
        return {name: found[name] for name in spec.tensors} if found.keys() >= spec.tensors.keys() else None

    def remember(self, spec: ModelSpec, look: Look, digests: Mapping[str, str]) -> None:
        """Keep the digests that were taken after `look`, unless a file changed since or may do so unseen."""
        by_file: dict[str, dict[str, str]] = {state.path: {} for state in look.files}
        for name, tensor in spec.tensors.items():
            for file in tensor.files:
                by_file[os.path.realpath(file)][name] = digests[name]
        for state in look.files:
            if state.is_settled(look.at_ns) and FileState.of(Path(state.path)) == state:
                self._write(state, by_file[state.path])

    def forget_missing(self) -> None:
        """Remove the records of files that are gone."""
        for record in self._records():
            path = self._content(record).get("file", {}).get("path")
            if not isinstance(path, str) or not os.path.exists(path):
                record.unlink(missing_ok=True)

    def _records(self) -> Iterable[Path]:
        return self.folder.glob("*.json")

    def _place(self, state: FileState) -> Path:
        return self.folder / f"{digest(state.path.encode(errors='surrogateescape'))[:32]}.json"

    def _read(self, state: FileState) -> dict[str, str] | None:
        content = self._content(self._place(state))
        tensors = content.get("tensors")
        if content.get("file") != asdict(state) or not isinstance(tensors, dict):
            return None
        return tensors if all(isinstance(one, str) for one in tensors.values()) else None

    def _content(self, record: Path) -> dict[str, Any]:
        try:
            content = json.loads(record.read_bytes())
        except (OSError, ValueError):  # not there, or half of it: as good as nothing
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, state: FileState, tensors: Mapping[str, str]) -> None:
        place = self._place(state)
        beside = place.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({"file": asdict(state), "tensors": tensors}), encoding="utf-8")
            os.replace(beside, place)
        except (OSError, UnicodeEncodeError) as error:
            emit("store.not_remembered", file=state.path, reason=str(error))
