"""An entry mapped into this process: tensors that are views of the file, shared with every process that has it.

Nothing is copied and nothing is read to attach one. Pages come when they are first touched, or ahead of that by
`bring_in`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.checkpoint.spec import TensorInfo

from .entry import MANIFEST, STRETCH, TORCH_TYPES, DamagedError, Entry, Manifest
from .locks import open_in_use

if TYPE_CHECKING:
    import torch

POPULATE_READ = 22  # MADV_POPULATE_READ, since Linux 5.14; Python has no name for it
PAGE = mmap.ALLOCATIONGRANULARITY
AROUND = 1 << 20  # bytes that Linux may map around a page that is touched: 64 KB, or all that it cached in one piece
THREADS = 4  # that fetch pages: as many reads as keep a disk busy


class Attached:
    """The tensors of an entry, by name; until `close` the entry is in use, and nobody removes it."""

    def __init__(self, entry: Entry) -> None:
        """Map `entry`; raise DamagedError when it is not what it says, OSError when it is gone."""
        self.entry = entry
        self._held = open_in_use(entry.folder / MANIFEST)
        self._let_go = weakref.finalize(self, self._held.close)
        if Manifest.read(self._held) != entry.manifest:
            raise DamagedError("its manifest changed while it was looked at")
        header = entry.header()
        with entry.weights.open("rb") as stream:
            # Private: a write by mistake changes a copy of a page, not the file.
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensors: dict[str, torch.Tensor] = {name: _view(mapping, tensor) for name, tensor in header.items()}
        self._places = {name: range(tensor.offset, tensor.offset + tensor.nbytes) for name, tensor in header.items()}
        self._fetching = _Fetching(mapping)
        self._rarely_used: Collection[str] = ()
        self._at_most = self._rows_left = 0  # bytes of it, and rows that may be looked up before pages go

    def bring_in(self, *, rarely_used: Collection[str] = (), at_most: int = 0) -> None:
        """Start to bring all pages into memory, from the disk where they are not there yet; return at once.

        Tensors of which few rows are ever used come last, and only into the system's memory; as they are looked up,
        this process has `at_most` bytes of them.
        """
        self._rarely_used = rarely_used
        self._at_most = at_most
        self._rows_left = self._rows_at_once() if rarely_used else 0
        places = sorted((name in rarely_used, place.start, place.stop) for name, place in self._places.items())
        self._fetching.start([
            _Stretch(start, min(start + STRETCH, stop), is_mapped=not is_rare)
            for is_rare, first, stop in places for start in range(first, stop, STRETCH)
        ])  # fmt: skip

    def note_lookups(self, rows: int) -> None:
        """Take note that so many rows of what is rarely used were read; all of its pages go before they are too many.

        They stay in the system's memory: the next row costs a page fault, a millionth of a second or less.
        """
        if not self._rarely_used:
            return
        self._rows_left -= rows
        mapping = self._fetching.mapping()
        if self._rows_left > 0 or mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        self._rows_left = self._rows_at_once()
        for name in self._rarely_used:
            start = -(-self._places[name].start // PAGE) * PAGE
            if (length := self._places[name].stop - start) > 0:
                mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def _rows_at_once(self) -> int:
        """Return how many rows are read before pages are let go: the system maps some around each that is touched."""
        used = [self.tensors[name] for name in self._rarely_used]
        return max(1, self._at_most // sum(tensor.nbytes // max(1, len(tensor)) + AROUND for tensor in used))

    def let_pages_go(self) -> None:
        """Take the file's pages out of this process; they come back when touched.

        That costs a read unless the system's cache has kept them. Nothing is brought in ahead any more.
        """
        self._fetching.stop()
        mapping = self._fetching.mapping()
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the entry; views that were handed out stay valid, and keep its file mapped but not in memory."""
        self.tensors = {}
        self.let_pages_go()
        self._let_go()


def _view(mapping: mmap.mmap, tensor: TensorInfo) -> torch.Tensor:
    import torch

    dtype = getattr(torch, TORCH_TYPES[tensor.dtype])
    if tensor.elements == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=tensor.elements, offset=tensor.offset).view(tensor.shape)


@dataclass(frozen=True)
class _Stretch:
    """Bytes [start, stop) of a file, and whether their pages are to be mapped into the process."""

    start: int
    stop: int
    is_mapped: bool


class _Fetching:
    """Threads that have the system map a file's pages, front to back, with many reads in the disk's queue.

    Pages that are only touched come with a little read ahead, a third as fast as the disk can. No thread keeps the
    mapping from one stretch to the next: when nobody uses it any more it goes, and they end.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = weakref.ref(mapping)
        self._stretches: Iterator[_Stretch] = iter(())
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, stretches: Sequence[_Stretch]) -> None:
        """Start the threads on these stretches of the file; they end by themselves."""
        self._stretches = iter(_joined(stretches))
        self._threads = [
            threading.Thread(target=self._run, name="loadstone-fetch", daemon=True) for _ in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, within a stretch."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._lock:
                stretch = next(self._stretches, None)
            mapping = self.mapping()
            if stretch is None or mapping is None:
                return
            _fetch(mapping, stretch)
            del mapping


def _joined(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Join neighbours up to a whole stretch: most tensors are small."""
    joined: list[_Stretch] = []
    for one in stretches:
        last = joined[-1] if joined else None
        if (
            last
            and last.is_mapped == one.is_mapped
            and 0 <= one.start - last.stop < PAGE
            and one.stop <= last.start + STRETCH
        ):
            joined[-1] = _Stretch(last.start, one.stop, one.is_mapped)
        else:
            joined.append(one)
    return joined


def _fetch(mapping: mmap.mmap, stretch: _Stretch) -> None:
    """Have the system read a stretch, and keep its pages mapped where they are wanted so; advice, no more than that."""
    import torch

    start = stretch.start // PAGE * PAGE
    length = stretch.stop - start
    if sys.platform == "linux":
        whole = torch.frombuffer(mapping, dtype=torch.uint8)  # its address; the GIL is free during the call
        place, size = ctypes.c_void_p(whole.data_ptr() + start), ctypes.c_size_t(length)
        if ctypes.CDLL(None).madvise(place, size, POPULATE_READ) == 0:
            if not stretch.is_mapped:
                mapping.madvise(mmap.MADV_DONTNEED, start, length)
            return
    if hasattr(mmap, "MADV_WILLNEED"):
        mapping.madvise(mmap.MADV_WILLNEED, start, length)
