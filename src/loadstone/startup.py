"""Brings torch in soon, and beside other work: most of the time before a first token is the import of it.

Knows no model. Only one thread at a time can run Python, so what overlaps is little but worth having: the system loads
torch's library, which takes no Python, while another thread reads a tokenizer, which lets no other Python run.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from .memory import uncollected

Result = TypeVar("Result")


@contextmanager
def in_background(function: Callable[[], Result]) -> Iterator[Callable[[], Result]]:
    """Run `function` in a thread beside the block; calling what is yielded waits, and returns or raises what it did.

    The thread ends before the block does, however that ends: nobody goes on, or forks, with a library half imported.
    """
    with ThreadPoolExecutor(1, "loadstone-startup") as pool:
        yield pool.submit(function).result


def import_torch() -> None:
    """Import torch; raise what `import torch` raises."""
    if "torch" in sys.modules:
        return
    _load_library()
    with uncollected():
        import torch  # noqa: F401


def _load_library() -> None:
    """Have the system load torch's library without holding up other threads, which Python's own import does.

    What cannot be loaded is left to the import, which says why.
    """
    found = find_spec("torch")
    dlopen = getattr(ctypes.CDLL(None), "dlopen", None) if sys.platform == "linux" else None
    if found is None or found.origin is None or dlopen is None:
        return
    dlopen.restype = ctypes.c_void_p
    library = Path(found.origin).parent / "lib" / "libtorch.so"
    dlopen(os.fsencode(library), ctypes.c_int(os.RTLD_NOW))
