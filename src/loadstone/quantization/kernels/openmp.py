"""torch's own OpenMP runtime, so that our loops and torch's share one set of threads."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

SOFT = 1  # omp_pause_soft: settings stay (OpenMP 5.0, section 3.2.40)
SYMBOLS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def openmp_symbols() -> dict[str, int]:
    """Return the addresses of the runtime's entry points; empty where torch does not bring GNU-compatible OpenMP."""
    library = _library()
    if library is None:
        return {}
    addresses = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in SYMBOLS}
    return {name: address for name, address in addresses.items() if address is not None}


def end_workers() -> None:
    """End the OpenMP workers of the calling thread; they come back when it next needs them.

    Each thread that computes has workers of its own. As soon as there are more of them than cores, OpenMP lets all of
    them sleep between products, and waking costs more than a product: a thread that is done should not keep any.
    """
    pause = getattr(_library(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(SOFT)


def compute_alone() -> None:
    """Let the calling thread, one of several that share the cores, do its arithmetic without helpers."""
    import torch

    torch.get_num_threads()  # torch sets the number once in each thread, when first asked; ours is to stay
    library = _library()
    if library is not None:
        library.omp_set_num_threads(1)


@cache
def _library() -> ctypes.CDLL | None:
    import torch

    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return ctypes.CDLL(str(found[0])) if found else None  # already loaded by torch: the same copy comes back
