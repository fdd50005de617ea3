"""One file on its way to the cache: resumed where it stopped, counted, and accepted when its hash is right.

Nothing that does not have its size and its hash ever gets its place; one call is one attempt. Knows neither networks
nor which files there are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from loadstone.errors import LoadstoneError, ResourceError, SourceError, TransientSourceError
from loadstone.telemetry import emit

from .base import NoPartsError, RemoteFile
from .cache import FileCache

EVENT_SECONDS = 0.1

Read = Callable[[int, int], "Generator[bytes, None, None]"]


def bring(cache: FileCache, commit: str, file: RemoteFile, read: Read) -> None:
    """Bring the content of a file into the cache, going on where an earlier attempt stopped.

    `read` yields bytes [start, stop) of it. Raises TransientSourceError where what arrived is not the file.
    """
    from ._huggingface import lock

    with _disk_errors(cache, file):
        for path in (cache.partial(file), cache.lock(file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with lock(cache.lock(file)):
            if cache.content(commit, file) is not None:
                return  # another process was faster
            with _Incoming(cache.partial(file), file) as incoming:
                if incoming.arrived < file.size:
                    _take(read, incoming)
                incoming.check()
            os.replace(cache.partial(file), cache.blob(file))


def adopt(cache: FileCache, file: RemoteFile, copy: Path) -> bool:
    """Take what another program fetched before, where it is this file; tell whether it was."""
    from ._huggingface import lock

    try:
        if copy.stat().st_size != file.size:
            return False
        cache.lock(file).parent.mkdir(parents=True, exist_ok=True)
        with lock(cache.lock(file)), copy.open("rb") as stream:
            digest = _digest(file)
            while block := stream.read(2**20):
                digest.update(block)
            if digest.hexdigest() != file.identity:
                return False
            cache.adopt(file, copy)
    except OSError:  # on another disk, or not to be read: it is fetched instead
        return False
    return True


def _take(read: Read, incoming: _Incoming) -> None:
    try:
        with closing(read(incoming.arrived, incoming.file.size)) as blocks:
            incoming.take(blocks)
    except NoPartsError:
        incoming.discard()  # the place gives whole files only
        with closing(read(0, incoming.file.size)) as blocks:
            incoming.take(blocks)


class _Incoming:
    """A file on its way: what has arrived of it on disk, and the hash of that."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.file = file
        self.arrived = 0
        self._told = 0.0
        self._stream = path.open("a+b")
        self._digest = _digest(file)
        self._stream.seek(0)
        while block := self._stream.read(2**20):
            self._count(block)
        if self.arrived > file.size:
            self.discard()

    def __enter__(self) -> _Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()  # what has arrived is kept, for the next attempt

    def discard(self) -> None:
        """Forget what has arrived."""
        self._stream.truncate(0)
        self._stream.seek(0)
        self.arrived = 0
        self._digest = _digest(self.file)

    def take(self, blocks: Iterator[bytes]) -> None:
        """Append what arrives."""
        for block in blocks:
            if self.arrived + len(block) > self.file.size:
                raise self._damaged("is longer than")
            self._stream.write(block)
            self._count(block)
            self._tell()

    def check(self) -> None:
        """Raise TransientSourceError, and forget all of it, unless size and hash are right."""
        if self.arrived != self.file.size:
            raise self._damaged(f"ended after {self.arrived} of")
        if self._digest.hexdigest() != self.file.identity:
            raise self._damaged("does not have the hash of")
        self._tell(is_last=True)

    def _damaged(self, how: str) -> TransientSourceError:
        """Return the error for content that is not the file's, having forgotten it."""
        self.discard()
        return TransientSourceError(
            f"{self.file.name}: what arrived {how} the {self.file.size} bytes that are listed; it is discarded",
            hint="If it happens again, a proxy or mirror on the way is altering files.",
        )

    def _tell(self, is_last: bool = False) -> None:
        """Emit how far it is, at most ten times a second."""
        now = time.monotonic()
        if is_last or now - self._told >= EVENT_SECONDS:
            self._told = now
            emit("download.progress", file=self.file.name, done=self.arrived, total=self.file.size)

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.arrived += len(block)


def _digest(file: RemoteFile) -> Any:
    if len(file.identity) == 64:
        return hashlib.sha256()
    # A git blob is hashed with its kind and size before it.
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


@contextmanager
def _disk_errors(cache: FileCache, file: RemoteFile) -> Iterator[None]:
    """Translate what the disk raises; what a source raises is an error of ours already."""
    try:
        yield
    except LoadstoneError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{file.name}: the disk is full ({error.filename or cache.root})",
                hint=f"Make room, or set {cache.knob} to a folder on a larger disk; what has arrived is kept.",
            ) from error
        raise SourceError(
            f"{file.name}: {cache.root} cannot be written: {error}", hint=f"Check {cache.knob}."
        ) from error
