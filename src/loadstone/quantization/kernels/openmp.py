"""torch's own OpenMP runtime, so that our loops and torch's share one set of threads."""

from __future__ import annotations

import ctypes
from pathlib import Path

SYMBOLS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def openmp_symbols() -> dict[str, int]:
    """Return the addresses of the runtime's entry points; empty where torch does not bring GNU-compatible OpenMP."""
    import torch

    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        library = ctypes.CDLL(str(path))  # already loaded by torch: the same copy comes back
        addresses = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in SYMBOLS}
        return {name: address for name, address in addresses.items() if address is not None}
    return {}
