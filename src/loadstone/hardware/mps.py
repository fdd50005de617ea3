"""The probe for the GPU of a Mac, through torch."""

from __future__ import annotations

from . import _torch
from .cpu import processor_name
from .device import Device
from .limits import memory_limits


def probe() -> list[Device] | str:
    """Return Apple's GPU, or why there is none.

    It shares the machine's memory, so what is free there is the lesser of what Metal recommends and what is
    free. Metal also bounds each buffer. torch (2.13) does not tell by how much; it is half of the machine's memory or
    somewhat more.
    """
    memory = _torch.mps_memory()
    if isinstance(memory, str):
        return memory
    total, used = memory
    limits = memory_limits()
    free = max(0, min(total - used, limits.free_bytes))
    name = f"{processor_name()} GPU"
    return [
        Device(
            "mps", 0, name, total_bytes=total, free_bytes=free, capabilities=frozenset({"float16"}),
            largest_buffer_bytes=limits.physical_bytes // 2,
        )
    ]  # fmt: skip
