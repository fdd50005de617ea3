"""Gives memory that nothing uses back to the system. Knows no model, so every room may use it."""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback


def give_back() -> None:
    """Collect garbage, and make the allocators return what they keep: CUDA's, MPS's and the C library's."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only; musl returns memory by itself
        if trim is not None:
            trim(0)


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
