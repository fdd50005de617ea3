"""Reads stretches of files as fast as the disk gives them.

What the system has in memory already is copied from there; the rest comes straight from the disk into a page-aligned
buffer (O_DIRECT), which costs a tenth of the processor's time of an ordinary read and leaves the page cache to others.
Where a file system or a system knows no such reads, ordinary ones take their place. Knows nothing of tensors.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from contextlib import suppress
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from loadstone.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PAGE = 4096  # every disk's blocks divide it
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_BINARY: int = getattr(os, "O_BINARY", 0)
_one_seeks = threading.Lock()


class Buffer:
    """Page-aligned memory for stretches of up to `nbytes`, reused from one to the next.

    `tensor` is all of it as bytes; with `is_pinned` a GPU can copy from it by itself.
    """

    def __init__(self, nbytes: int, *, is_pinned: bool = False) -> None:
        import torch

        whole = -(-nbytes // PAGE) * PAGE + PAGE  # a stretch may begin anywhere in its first page
        if is_pinned:
            self.tensor = torch.empty(whole, dtype=torch.uint8, pin_memory=True)
        else:
            self.tensor = torch.frombuffer(mmap.mmap(-1, whole), dtype=torch.uint8)
        self.view: memoryview = memoryview(self.tensor.numpy())  # type: ignore[arg-type]

    def behind(self, start: int) -> Buffer:
        """Return what lies behind the first `start` bytes, whole pages, as a buffer over the same memory."""
        if not start:
            return self
        found = copy(self)
        found.tensor, found.view = self.tensor[start:], self.view[start:]
        return found

    def stretch(self, start: int, nbytes: int) -> torch.Tensor:
        """Return `nbytes` bytes from `start` on."""
        return self.tensor[start : start + nbytes]


class FileReader:
    """One file, opened for reading stretches of it from several threads, each into a buffer of its own."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._cached = os.open(file, os.O_RDONLY | _BINARY)
        except OSError as error:
            raise _unreadable(file, error) from error
        self._direct: int | None = None
        self._mapping: object = None
        self._address: int | None = None
        if _DIRECT:
            self._map()
            try:
                self._direct = os.open(file, os.O_RDONLY | _DIRECT)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    self.close()
                    raise _unreadable(file, error) from error

    def _map(self) -> None:
        """Map the file, to ask the system about its pages; none is touched."""
        import numpy as np

        with suppress(OSError, ValueError):  # an empty file, or one that cannot be mapped: then nothing is known of it
            mapping = np.frombuffer(mmap.mmap(self._cached, 0, access=mmap.ACCESS_READ), np.uint8)
            self._mapping, self._address = mapping, mapping.ctypes.data

    def read(self, offset: int, nbytes: int, buffer: Buffer) -> torch.Tensor:
        """Return bytes [offset, offset + nbytes) of the file, in `buffer`: good until that is used again.

        Raises CheckpointError when the file is shorter or cannot be read.
        """
        try:
            skipped = offset % PAGE
            is_direct = self._direct is not None and not self._is_cached(offset - skipped, skipped + nbytes)
            if is_direct and self._read_direct(offset - skipped, skipped + nbytes, buffer):
                return buffer.stretch(skipped, nbytes)
            _fill(self._cached, offset, nbytes, buffer)
        except OSError as error:
            raise _unreadable(self.file, error) from error
        except EOFError:
            raise CheckpointError(
                f"it is truncated: it ends within the {nbytes} bytes from {offset} on", file=self.file,
                hint="It changed since it was looked at: download it again.",
            ) from None  # fmt: skip
        return buffer.stretch(0, nbytes)

    def _is_cached(self, start: int, nbytes: int) -> bool:
        """Tell whether the system has all of these pages in memory; it may also say so of a file of somebody else's.

        A read that is not to wait (RWF_NOWAIT) tells too, but has the system read ahead what is then read twice.
        """
        import numpy as np

        if self._address is None or nbytes == 0:
            return False
        found = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
        place = ctypes.c_void_p(self._address + start), ctypes.c_size_t(nbytes), ctypes.c_void_p(found.ctypes.data)
        return ctypes.CDLL(None).mincore(*place) == 0 and bool((found & 1).all())

    def _read_direct(self, start: int, nbytes: int, buffer: Buffer) -> bool:
        """Read from a page's start around the page cache; return False where that cannot be done."""
        if self._direct is None:
            return False
        whole = -(-nbytes // PAGE) * PAGE
        done = 0
        try:
            while done < nbytes:
                got = os.preadv(self._direct, [buffer.view[done:whole]], start + done)
                done += got
                if got == 0 or (done < nbytes and done % PAGE):
                    raise EOFError
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False  # refused in spite of the open: this file system wants something else
        return True

    def close(self) -> None:
        """Close the file."""
        self._mapping = self._address = None
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_at(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    with _one_seeks:  # Windows: the place in the file is the descriptor's, and so every thread's
        os.lseek(descriptor, offset, os.SEEK_SET)
        got = os.read(descriptor, len(view))
    view[: len(got)] = got
    return len(got)


def _fill(descriptor: int, offset: int, nbytes: int, buffer: Buffer) -> None:
    done = 0
    while done < nbytes:
        got = _read_at(descriptor, buffer.view[done:nbytes], offset + done)
        if got == 0:
            raise EOFError
        done += got


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"it cannot be read: {error.strerror or error}", file=file)
