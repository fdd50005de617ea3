"""An entry being written: tensors as they come, then the header, then the manifest, and only then its name.

Whatever happens before the last step leaves no entry. Everything is on the disk before the rename, and the rename
before anybody is told, so that a loss of power at any moment leaves the entry whole or not there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone._blake3 import digest

from .entry import MANIFEST, PADDING, TORCH_TYPES, USED, WEIGHTS, Entry, Manifest
from .locks import sync_folder

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes: every tensor begins on a line of the processor's cache
BYTES_A_NAME = 320  # of the header, for each tensor; those of a decoder take half of it
FLUSH_SECONDS = 0.3
AT_ONCE = 8 << 20  # bytes written at a time: a write keeps all others of its file waiting
_STORED_TYPES = {name: stored for stored, name in TORCH_TYPES.items()}
_BINARY: int = getattr(os, "O_BINARY", 0)


class Draft:
    """A folder in which an entry is made; `put` may be called by several threads.

    The bytes of an entry do not depend on which thread is quicker: tensors get their places in the order of their
    number, and those that come early wait.
    """

    def __init__(self, folder: Path, *, most_tensors: int, nbytes: int) -> None:
        """Begin in `folder`, which must not exist, for about `nbytes` bytes; raise OSError when they do not fit."""
        folder.mkdir(parents=True)
        self.folder = folder
        self._lock = threading.Lock()
        self._waiting: dict[int, Mapping[str, torch.Tensor]] = {}
        self._next = 0
        self._start = -(-BYTES_A_NAME * most_tensors // 4096 + 1) * 4096
        self._end = self._start
        self._header: dict[str, dict[str, Any]] = {}
        self._digests: dict[str, str] = {}
        self._file = os.open(folder / WEIGHTS, os.O_CREAT | os.O_RDWR | _BINARY, 0o644)
        self._flusher = _Flusher(self._file)
        try:
            _reserve(self._file, self._start + nbytes)
        except OSError:
            self.discard()
            raise

    def put(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the tensors of part `number`; every number from 0 on must come once."""
        with self._lock:
            self._waiting[number] = tensors
            ready = []
            while self._next in self._waiting:
                ready += [self._place(*one) for one in self._waiting.pop(self._next).items()]
                self._next += 1
        for name, offset, tensor in ready:
            raw = memoryview(_bytes_of(tensor))
            self._write(raw, offset)
            self._digests[name] = digest(raw)

    def _place(self, name: str, tensor: torch.Tensor) -> tuple[str, int, torch.Tensor]:
        """Give a tensor its place in the file."""
        if over := self._end % ALIGNMENT:
            self._describe(f"{PADDING}{len(self._header)}", "U8", [ALIGNMENT - over], ALIGNMENT - over)
        offset = self._end
        stored = _STORED_TYPES[str(tensor.dtype).removeprefix("torch.")]
        self._describe(name, stored, list(tensor.shape), tensor.nbytes)
        return name, offset, tensor

    def _describe(self, name: str, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        begin = self._end - self._start
        self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        self._end += nbytes

    def _write(self, raw: memoryview, offset: int) -> None:
        done = 0
        while done < len(raw):
            done += _write_at(self._file, raw[done : done + AT_ONCE], offset + done)

    def publish(self, place: Path, manifest: Manifest) -> Entry:
        """Finish the entry and give it its name; return it, or the one of that name that was there already.

        The sizes and digests of the tensors are filled in.
        """
        header = json.dumps(self._header, separators=(",", ":")).encode()
        room = self._start - 8
        if len(header) > room:
            raise OSError(f"the header needs {len(header)} bytes, and {room} were kept for it")
        self._flusher.stop()
        os.ftruncate(self._file, self._end)
        self._write(memoryview(room.to_bytes(8, "little") + header.ljust(room)), 0)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        finished = Manifest(**{**asdict(manifest), "weights_bytes": self._end, "tensors": dict(self._digests)})
        for name, text in ((MANIFEST, json.dumps(asdict(finished), indent=1, sort_keys=True)), (USED, "")):
            with (self.folder / name).open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(self.folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # it is there already, or the next line says what is wrong
            os.rename(self.folder, place)
        sync_folder(place.parent)
        return Entry.at(place)

    def discard(self) -> None:
        """Leave nothing; does nothing after `publish`."""
        self._flusher.stop()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class _Flusher:
    """A thread that has the disk write while the load goes on, so that little is left to wait for at the end."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loadstone-flush", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the file may be closed after that."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        flush = getattr(os, "fdatasync", os.fsync)
        while not self._is_over.wait(FLUSH_SECONDS):
            with suppress(OSError):  # the last flush, in `publish`, says what is wrong
                flush(self._file)


def _reserve(file: int, nbytes: int) -> None:
    """Take room on the disk: a full one says so now, not at the end."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise


def _bytes_of(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


_one_seeks = threading.Lock()


def _write_at(file: int, raw: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, raw, offset)
    with _one_seeks:  # Windows: the place in the file is the descriptor's, and so every thread's
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, raw)
