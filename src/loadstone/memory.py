"""Gives memory that nothing uses back to the system. Knows no model, so every room may use it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_HEAD = re.compile(r"(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) (?P<permissions>\S+) \S+ \S+ \S+ *(?P<file>.*)")


def give_back() -> None:
    """Collect garbage, and make the allocators return what they keep: CUDA's, MPS's and the C library's."""
    gc.collect()
    empty_device_caches()
    trim()


@contextmanager
def exact_allocation() -> Iterator[None]:
    """Have the C library take large blocks from the system one by one inside, and return each when it is freed.

    Else what many threads free in turns stays in the allocator between what they keep. Afterwards blocks below 32 MB
    are kept for the next of their size again, as glibc itself does after the first of them. Of glibc alone.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, 32 << 20)
            mallopt(_TRIM_THRESHOLD, 64 << 20)


def let_code_go(library: str = "libllvmlite") -> None:
    """Take the pages of a library that are as its file has them out of this process; they come back when touched.

    A compiler has worked when kernels are there, and what it takes is more than they do. Linux alone.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, stop in _unchanged(library):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def _unchanged(library: str) -> list[tuple[int, int]]:
    """Return where a library is mapped and nothing in it was written: relocated pages would be lost."""
    found: list[tuple[int, int]] = []
    place: tuple[int, int] | None = None
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as said:
            for line in said:
                if (head := _HEAD.match(line)) is not None:
                    is_ours = library in head["file"] and "w" not in head["permissions"]
                    place = (int(head["start"], 16), int(head["stop"], 16)) if is_ours else None
                elif place is not None and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
                    found.append(place)
    except OSError:
        return []
    return found


def empty_device_caches() -> None:
    """Have torch return to CUDA and MPS what it keeps of their memory for the next tensor."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.cuda.is_initialized():
        # cuBLAS keeps a workspace for each thread's stream in torch's allocator, as if it were a tensor in use.
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def trim() -> None:
    """Have the C library return free pages to the system: glibc does so when asked, others by themselves."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc's allocator, or None where another C library is."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def device_memory() -> tuple[int, int]:
    """Return the bytes that tensors take on accelerators, and those that torch has there in all; wakes none up."""
    torch = sys.modules.get("torch")
    allocated = reserved = 0
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            allocated += torch.cuda.memory_allocated(index)
            reserved += torch.cuda.memory_reserved(index)
    if torch is not None and torch.backends.mps.is_available():
        allocated += torch.mps.current_allocated_memory()
        reserved += torch.mps.driver_allocated_memory()
    return allocated, reserved


@contextmanager
def nothing_left_on_failure() -> Iterator[None]:
    """Give back what was made in a block that fails, though its error be kept."""
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        give_back()
        raise


def forget_frames(error: BaseException) -> None:
    """Clear the frames of an error, its causes and its contexts: who keeps the error keeps none of their tensors."""
    known: dict[int, BaseException] = {}
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if one is not None and id(one) not in known:
            known[id(one)] = one
            traceback.clear_frames(one.__traceback__)
            found += [one.__cause__, one.__context__]
