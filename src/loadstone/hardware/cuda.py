"""The probe for CUDA devices, through torch."""

from __future__ import annotations

from loadstone.telemetry import emit

from . import _torch
from .device import Device, Unusable


def probe() -> list[Device] | str:
    """Return the CUDA devices that this torch has kernels for, or why there are none."""
    facts = _torch.cuda_facts()
    if isinstance(facts, str):
        return facts
    without = [_no_kernels(one) for one in facts if not one.has_kernels]
    usable = [_device(one) for one in facts if one.has_kernels]
    if not usable:
        return Unusable("; ".join(without)) if without else "torch sees no CUDA device"
    for reason in without:
        emit("hardware.warning", kind="cuda", reason=reason)
    return usable


def _device(facts: _torch.CudaFacts) -> Device:
    major, minor = facts.compute_capability
    found = {f"sm_{major}{minor}", "float16"} | ({"bfloat16"} if facts.has_bfloat16 else set())
    return Device(
        kind="cuda",
        index=facts.index,
        name=facts.name,
        total_bytes=facts.total_bytes,
        free_bytes=facts.free_bytes,
        cores=facts.processors,
        capabilities=frozenset(found),
    )


def _no_kernels(facts: _torch.CudaFacts) -> str:
    major, minor = facts.compute_capability
    return f"this build of torch has no kernels for cuda:{facts.index} ({facts.name}, sm_{major}{minor})"
