"""The probe for this machine's processor: its name, the cores this process may use, and what it can multiply.

Reads what the system says, without torch, so that a plan can be made without loading it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from ._cgroups import CGROUP_ROOT, PROC_ROOT, groups_above, read_numbers
from .device import Device
from .limits import memory_limits

# Names in /proc/cpuinfo that matter to a product, and ours for them.
_LINUX_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "arm_bf16",
}
_MAC_FLAGS = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "arm_bf16",
}
_WINDOWS_AVX2, _WINDOWS_AVX512F = 40, 41  # IsProcessorFeaturePresent, winnt.h


def probe() -> list[Device]:
    """Return this machine's processor as the one device of its kind; it is always there."""
    limits = memory_limits()
    return [
        Device(
            kind="cpu",
            index=None,
            name=processor_name(),
            total_bytes=limits.limit_bytes,
            free_bytes=limits.free_bytes,
            cores=usable_cores(),
            capabilities=capabilities(),
        )
    ]


def processor_name(*, proc_root: Path = PROC_ROOT) -> str:
    """Return the processor's name as the system has it, such as "AMD EPYC 7763 64-Core Processor"."""
    for block in _cpuinfo(proc_root):
        for key in ("model name", "Hardware", "cpu model"):
            if block.get(key):
                return block[key]
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores(*, proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT) -> int:
    """Return how many threads keep this process's cores busy, at least 1.

    That is the least of the physical cores, those the process may run on, and the processor time that the
    control groups above it allow. Two threads on one core share its arithmetic and gain nothing.
    """
    allowed = _allowed_processors()
    bounds = [len(allowed) or 1]
    cores = {
        (block.get("physical id"), block["core id"])
        for block in _cpuinfo(proc_root)
        if "core id" in block and block.get("processor", "").isdigit() and int(block["processor"]) in allowed
    }
    physical = len(cores) or psutil.cpu_count(logical=False) or 0
    if physical:
        bounds.append(physical)
    quota = _quota(proc_root, cgroup_root)
    if quota is not None:
        # Rounded down: with more threads than time, all of them wait for the one that was stopped.
        bounds.append(int(quota))
    return max(1, min(bounds))


def capabilities(*, proc_root: Path = PROC_ROOT) -> frozenset[str]:
    """Return what the processor can do, such as "avx2", "fma", "avx512_bf16", "amx_bf16", "neon"."""
    blocks = _cpuinfo(proc_root)
    if blocks:
        flags = set((blocks[0].get("flags") or blocks[0].get("Features") or "").split())
        return frozenset(ours for theirs, ours in _LINUX_FLAGS.items() if theirs in flags)
    if sys.platform == "darwin":
        return mac_capabilities(_sysctl)
    if sys.platform == "win32":
        return _windows_capabilities()
    return frozenset()


def mac_capabilities(sysctl: Callable[[str], str]) -> frozenset[str]:
    """Return the capabilities that macOS tells of; `sysctl` maps a name to its value, or ""."""
    found = {ours for name, ours in _MAC_FLAGS.items() if sysctl(name) == "1"}
    if "FMA" in sysctl("machdep.cpu.features").split():
        found.add("fma")
    return frozenset(found)


def _windows_capabilities() -> frozenset[str]:
    if sys.platform != "win32":
        return frozenset()
    import ctypes

    present = ctypes.windll.kernel32.IsProcessorFeaturePresent
    found = set()
    if present(_WINDOWS_AVX2):
        found |= {"avx2", "fma"}  # every processor with AVX2 that Windows runs on has FMA
    if present(_WINDOWS_AVX512F):
        found.add("avx512f")
    if platform.machine().lower() in ("arm64", "aarch64"):
        found.add("neon")
    return frozenset(found)


def _allowed_processors() -> set[int]:
    if sys.platform == "linux":
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _quota(proc_root: Path, cgroup_root: Path) -> float | None:
    """Return how many processors' time the control groups allow, or None when they do not say."""
    quotas = []
    for version, folder in groups_above("cpu", proc_root=proc_root, cgroup_root=cgroup_root):
        if version == 2:
            numbers = read_numbers(folder / "cpu.max")
        else:
            numbers = read_numbers(folder / "cpu.cfs_quota_us") + read_numbers(folder / "cpu.cfs_period_us")
        if len(numbers) == 2 and numbers[0] is not None and numbers[1] and numbers[0] > 0:
            quotas.append(numbers[0] / numbers[1])
    return min(quotas, default=None)


def _cpuinfo(proc_root: Path) -> list[dict[str, str]]:
    """Return /proc/cpuinfo, one mapping a processor; empty where there is none."""
    try:
        text = (proc_root / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, separator, value in pairs if separator})
    return [block for block in blocks if block]


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
