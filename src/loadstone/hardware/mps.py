"""The probe for the GPU of a Mac, through torch."""

from __future__ import annotations

from . import _torch
from .cpu import processor_name
from .device import Device
from .limits import memory_limits


def probe() -> list[Device] | str:
    """Return Apple's GPU, or why there is none.

    It shares the machine's memory, so what is free there is the lesser of what Metal recommends and what is
    free.
    """
    memory = _torch.mps_memory()
    if isinstance(memory, str):
        return memory
    total, used = memory
    free = max(0, min(total - used, memory_limits().free_bytes))
    name = f"{processor_name()} GPU"
    return [Device("mps", 0, name, total_bytes=total, free_bytes=free, capabilities=frozenset({"float16"}))]
