"""Facts about the machine: its devices, their memory and what bounds it, and how they are best used."""

from ._torch import may_have_gpu
from .device import Check, CompatibilityReport, Device, MemorySettings, Unusable
from .limits import CgroupLimit, MemoryLimits, memory_limits, peak_rss, process_rss
from .manager import DeviceManager, get_device_manager
from .pages import resident_bytes
from .probes import Probe, register_probe

__all__ = [
    "CgroupLimit",
    "Check",
    "CompatibilityReport",
    "Device",
    "DeviceManager",
    "MemoryLimits",
    "MemorySettings",
    "Probe",
    "Unusable",
    "get_device_manager",
    "may_have_gpu",
    "memory_limits",
    "peak_rss",
    "process_rss",
    "register_probe",
    "resident_bytes",
]
