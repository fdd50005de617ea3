"""Whether a device can run a model, check by check, and how a device is best used: arithmetic and facts.

Knows sizes of a model, not its files: anything with the attributes of `ModelShape` will do.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Protocol

from loadstone.units import format_size

from .device import Check, CompatibilityReport, Device, MemorySettings

BLOCK = 64  # numbers that share a scale in 4 bits
_FOUR_BIT = 0.5 + 4 / BLOCK  # bytes a number with its share of the scale, as float32


class ModelShape(Protocol):
    """What is asked of a model here; `checkpoint.ModelSpec` has it."""

    @property
    def name(self) -> str:
        """What people call the model."""

    @property
    def hidden_size(self) -> int:
        """Numbers in a token's state."""

    @property
    def head_size(self) -> int:
        """Numbers in one head's query."""

    @property
    def intermediate_size(self) -> int:
        """Numbers inside the MLP."""

    @property
    def vocab_size(self) -> int:
        """Tokens known."""

    @property
    def tied_embeddings(self) -> bool:
        """Whether the embedding is also the last matrix."""

    @property
    def parameters(self) -> int:
        """Numbers in all."""


def check_compatibility(spec: ModelShape, device: Device) -> CompatibilityReport:
    """Return what was checked of `spec` on `device`, each with a remedy where it is not well."""
    checks = (
        _compute_type(device),
        _memory(spec, device),
        _kernels(),
        _processor(device),
        _head_size(spec),
        _blocks(spec),
        _driver(device),
    )
    return CompatibilityReport(device, checks)


def least_bytes(spec: ModelShape) -> int:
    """Return about how many bytes the weights take in 4 bits, embedding and last matrix in 8."""
    outer = spec.vocab_size * spec.hidden_size
    in_eight = min(outer if spec.tied_embeddings else 2 * outer, spec.parameters)
    return round((spec.parameters - in_eight) * _FOUR_BIT) + in_eight


def _compute_type(device: Device) -> Check:
    chosen = best_settings(device).compute_dtype
    if device.kind != "cuda" or chosen != "float16":
        return Check("compute type", True, f"products are made in {chosen}")
    remedy = "A model made for bfloat16 can overflow in float16; if answers break, use device cpu."
    found = f"{device.name} has no bfloat16; float16 is used"
    return Check("compute type", False, found, remedy, required=False)


def _memory(spec: ModelShape, device: Device) -> Check:
    needed = least_bytes(spec)
    found = f"weights in 4 bits take {format_size(needed)}; {format_size(device.free_bytes)} is free"
    remedy = "Close other programs, raise the container's memory limit, or choose a smaller model."
    well = needed < device.free_bytes
    return Check("memory", well, found, "" if well else remedy)


def _kernels() -> Check:
    if find_spec("bitsandbytes") is not None:
        return Check("kernels", True, "bitsandbytes is installed")
    remedy = "Run: pip install bitsandbytes. Until then a slower product is used."
    return Check("kernels", False, "bitsandbytes is not installed", remedy, required=False)


def _processor(device: Device) -> Check:
    if device.kind != "cpu":
        return Check("fast product", True, f"{device.kind} has its own")
    for needed in ("avx2", "neon"):
        if needed in device.capabilities:
            return Check("fast product", True, f"the processor has {needed}")
    remedy = "Use a processor with AVX2 or NEON, or a GPU; the answer comes all the same, more slowly."
    return Check("fast product", False, "the processor has neither AVX2 nor NEON", remedy, required=False)


def _head_size(spec: ModelShape) -> Check:
    if spec.head_size > 0 and spec.head_size % 2 == 0:
        return Check("head size", True, f"{spec.head_size}")
    remedy = "Choose another checkpoint: positions are rotations of pairs, so a head must have an even size."
    return Check("head size", False, f"{spec.head_size} is not even", remedy)


def _blocks(spec: ModelShape) -> Check:
    sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % BLOCK]
    if not odd:
        return Check("4-bit blocks", True, f"rows are whole blocks of {BLOCK}")
    remedy = "Set quantization to 8bit or none if 4bit is refused or slow for this model."
    found = f"{', '.join(odd)}: not a multiple of {BLOCK}"
    return Check("4-bit blocks", False, found, remedy, required=False)


def _driver(device: Device) -> Check:
    if device.kind == "cpu":
        return Check("driver", True, "none is needed")
    if device.total_bytes > 0:
        return Check("driver", True, f"torch can use {device.torch_name}")
    return Check("driver", False, f"{device.torch_name} shows no memory", "Reinstall or update its driver.")


def best_settings(device: Device, compute_dtype: str | None = None) -> MemorySettings:
    """Return how `device` is best used, with the reason for each choice.

    `compute_dtype` is what somebody asked for; a GPU without bfloat16 makes products in float16 all the same.
    """
    if device.kind == "cpu":
        return _cpu_settings(device)
    best = _gpu_settings(device)
    if compute_dtype in (None, best.compute_dtype):
        return best
    if compute_dtype == "bfloat16" and "bfloat16" not in device.capabilities:
        return replace(best, reasons=(f"bfloat16 was asked for: {best.reasons[0]}", *best.reasons[1:]))
    reasons = (f"{compute_dtype}: as asked", *best.reasons[1:])
    return replace(best, compute_dtype=compute_dtype, cache_dtype=compute_dtype, reasons=reasons)


def _gpu_settings(device: Device) -> MemorySettings:
    if device.kind == "mps":
        reasons = (
            "float16: the type that Apple's GPUs multiply fastest on every generation",
            "512 prompt tokens at a time: keeps each buffer far below Metal's cap",
        )
        return MemorySettings("float16", "float16", 512, 0, reasons)
    if "bfloat16" in device.capabilities:
        dtype, why = "bfloat16", "bfloat16: the device has it, and models are made in it"
    else:
        dtype, why = "float16", "float16: the device has no bfloat16"
    chunk = 2048 if device.kind == "cuda" else 512
    reasons = (why, f"{chunk} prompt tokens at a time: enough to fill the device")
    return MemorySettings(dtype, dtype, chunk, 0, reasons)


def _cpu_settings(device: Device) -> MemorySettings:
    reasons = (
        "float32 activations: the products scale them to 15-bit integers themselves, and norms lose nothing",
        "float16 KV cache: half of float32's bytes to keep and to read for each token",
        "64 prompt tokens at a time: products are at full speed, and Ctrl-C is heard soon",
        f"{device.cores} threads: the cores this process may use",
    )
    return MemorySettings("float32", "float16", 64, device.cores, reasons)
