"""The probe for Intel's GPUs, which torch calls XPU."""

from __future__ import annotations

from . import _torch
from .device import Device


def probe() -> list[Device] | str:
    """Return Intel's GPUs as torch sees them, or why there are none."""
    facts = _torch.xpu_facts()
    if isinstance(facts, str):
        return facts
    return [
        Device("xpu", one.index, one.name, one.total_bytes, one.free_bytes, one.units, frozenset(one.types))
        for one in facts
    ]
