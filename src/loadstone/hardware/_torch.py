"""All that this room asks of torch, imported when asked: which accelerators it sees, and how they are."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from . import _nvml
from .device import Unusable

DRIVERS = ("nvidia*", "dxg", "kfd", "nvgpu", "nvhost-gpu", "nvmap")
"""What a driver for GPUs that torch calls CUDA shows in /dev: NVIDIA's, that of WSL, AMD's, and those of Jetsons."""


FOR_CERTAIN = ("nvidia*", "kfd")
"""Those that are there only where a GPU is, too."""


@dataclass(frozen=True)
class XpuFacts:
    """One of Intel's GPUs as torch sees it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    units: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class CudaFacts:
    """One CUDA (or ROCm) device as torch sees it; `free_bytes` includes what its cache holds unused."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    processors: int
    has_bfloat16: bool
    has_kernels: bool


def may_have_gpu(*, dev: Path = Path("/dev")) -> bool:
    """Tell whether looking for a GPU could find one: not on Linux where no driver is loaded."""
    return sys.platform != "linux" or _shows(DRIVERS, dev)


def _shows(names: tuple[str, ...], dev: Path) -> bool:
    return any(True for name in names for _ in dev.glob(name))


def cuda_facts(*, dev: Path = Path("/dev")) -> list[CudaFacts] | str:
    """Return the CUDA devices, or why there are none; where Linux shows no driver, torch need not be asked."""
    if not may_have_gpu(dev=dev):
        return "no driver for a GPU is loaded"
    import torch

    reason = Unusable if _shows(FOR_CERTAIN, dev) else str
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return reason("this build of torch has no CUDA support; install one from pytorch.org that has")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = str(caught[0].message).splitlines()[0] if caught else "no device or no driver was found"
        return reason(f"torch cannot use CUDA: {why}")
    return [_one(index) for index in range(torch.cuda.device_count())]


def _one(index: int) -> CudaFacts:
    import torch

    about = torch.cuda.get_device_properties(index)
    free = _nvml.free_bytes(str(about.uuid)) if hasattr(about, "uuid") else None
    if free is None:
        free = torch.cuda.mem_get_info(index)[0]  # takes a context on the device
    unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return CudaFacts(
        index=index,
        name=about.name,
        total_bytes=about.total_memory,
        free_bytes=free + max(0, unused),
        compute_capability=(about.major, about.minor),
        processors=about.multi_processor_count,
        # torch's own rule (`is_bf16_supported`), which would look at the current device and take a context there.
        has_bfloat16=torch.version.cuda is None or about.major >= 8,
        has_kernels=_has_kernels(torch.cuda.get_arch_list(), (about.major, about.minor)),
    )


def _has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Tell whether a torch built for `built_for` ("sm_80", "compute_90") has code that a device can run.

    Code runs on the same major version with an equal or higher minor; "compute_" code is compiled for any
    later one.
    """
    if not built_for or not any(name.startswith(("sm_", "compute_")) for name in built_for):
        return True  # ROCm, or a build that does not say
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = "".join(character for character in number if character.isdigit())
        if len(digits) < 2:
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def xpu_facts() -> list[XpuFacts] | str:
    """Return Intel's GPUs, or why there are none; a torch that is not built for them need not be asked."""
    if "+xpu" not in version("torch"):
        return "this build of torch has no XPU support"
    import torch

    if not torch.xpu.is_available():
        return "torch sees no XPU device"
    return [_one_xpu(index) for index in range(torch.xpu.device_count())]


def _one_xpu(index: int) -> XpuFacts:
    import torch

    about = torch.xpu.get_device_properties(index)
    free, total = torch.xpu.mem_get_info(index)
    unused = torch.xpu.memory_reserved(index) - torch.xpu.memory_allocated(index)
    types = ("float16", "bfloat16") if torch.xpu.is_bf16_supported() else ("float16",)
    return XpuFacts(index, about.name, total, free + max(0, unused), about.max_compute_units, types)


def mps_memory() -> tuple[int, int] | str:
    """Return (total, in use) bytes of Apple's GPU as Metal recommends them, or why there is none."""
    if sys.platform != "darwin":
        return "MPS is a Mac's"
    import torch

    if not torch.backends.mps.is_built():
        return "this build of torch has no MPS support"
    if not torch.backends.mps.is_available():
        return "torch cannot use MPS: it needs macOS 14 or later on a Mac with Apple silicon"
    return int(torch.mps.recommended_max_memory()), int(torch.mps.driver_allocated_memory())
