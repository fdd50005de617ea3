"""Brings torch in soon and beside other work, because its import is most of the time before a first token.

Only one thread at a time runs Python, so what overlaps is little but worth having: the system loads torch's library,
which takes no Python, while another thread reads a tokenizer, which lets no other Python run. Knows no model.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def in_background(function: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Run `function` in a thread beside the block; calling what is yielded waits, and returns or raises what it did.

    The thread ends before the block does, however that ends: nobody goes on, or forks, with a library half imported.
    """
    with ThreadPoolExecutor(1, "loadstone-startup") as pool:
        yield pool.submit(function).result


def importing_torch() -> AbstractContextManager[Callable[[], None]]:
    """Import torch in a thread beside the block; calling what is yielded waits, and raises what `import torch` does."""
    if "torch" in sys.modules:
        return nullcontext(_import_torch)  # it may be another thread that imports it: then this waits
    # Found now, because the thread should come to its first long step at once: where it waits for the disk, another
    # thread runs, and one that begins to read a tokenizer lets nobody else run before the end of it.
    load_library = _library_loader()

    def work() -> None:
        load_library()
        with uncollected():
            _import_torch()

    return in_background(work)


def _import_torch() -> None:
    import torch  # noqa: F401


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from looking again and again through what is made inside, all of which stays.

    Afterwards it counts as old. Garbage among it is found by the next collection of everything.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # or what somebody else has frozen would thaw
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, without a look
        if was_on:
            gc.enable()


def _library_loader() -> Callable[[], None]:
    """Return a function that has the system load torch's library; other threads go on meanwhile.

    It opens what the import opens, in the same order and way. What cannot be opened is left to the import, which says
    why.
    """
    found = find_spec("torch")
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None) if sys.platform == "linux" else None
    if found is None or found.origin is None or dlopen is None:
        return lambda: None
    dlopen.restype = ctypes.c_void_p
    folder = os.fsencode(Path(found.origin).parent / "lib")
    needed, library = folder + b"/libtorch_global_deps.so", folder + b"/libtorch.so"

    def load() -> None:
        if dlopen(needed, ctypes.c_int(os.RTLD_NOW | os.RTLD_GLOBAL)):
            dlopen(library, ctypes.c_int(os.RTLD_NOW))

    return load
