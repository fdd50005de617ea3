"""The CPU kernels as functions on torch tensors; `cpu_kernels()` is None where this machine cannot have them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from ...telemetry import emit
from .openmp import openmp_symbols

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_lock = threading.Lock()
_found: list[CpuKernels | None] = []


class CpuKernels:
    """Compiled products and quantisers. Tensors are contiguous and on the CPU; x and y are float32.

    Calls are thread-safe: each makes its own scratch space.
    """

    def __init__(self) -> None:
        from ._llvm import WORDS, Compiled, new_module
        from .products import build_products
        from .quantizers import build_quantizers

        module = new_module()
        build_products(module)
        build_quantizers(module)
        self._compiled = Compiled(module, openmp_symbols())
        self._array = ctypes.c_int64 * WORDS
        names = ["nf4", "int8", *_NAMES.values(), *(f"quantize_nf4_{name}" for name in _NAMES.values())]
        self._functions: dict[str, Callable[[Any], None]] = {name: self._compiled.function(name) for name in names}

    def nf4(self, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, scale: float) -> torch.Tensor:
        """Return x·Wᵀ (M × N) for codes N × K/2 (uint8) and absmax N × K/64 (float16), times `scale`."""
        return self._integer("nf4", x, codes, absmax, scale)

    def int8(self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ (M × N) for a weight N × K (int8) and one float32 scale for each of its rows."""
        return self._integer("int8", x, weight, scales, 1.0)

    def dense(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ (M × N) for a weight N × K of float32, bfloat16 or float16; K is a multiple of 32."""
        y = torch.empty(x.shape[0], weight.shape[0])
        words = (x.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), *weight.shape, x.shape[0], 0, 0, 0)
        self._functions[_NAMES[weight.dtype]](self._array(*words, torch.get_num_threads()))
        return y

    def quantize_nf4(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the NF4 codes (rows × columns/2, uint8) and absmax (rows × columns/64, float32) of a weight."""
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        absmax = torch.empty(rows, columns // 64)
        words = (weight.data_ptr(), codes.data_ptr(), absmax.data_ptr(), rows * columns, 0, 0, 0, 0, 0, 0)
        self._functions[f"quantize_nf4_{_NAMES[weight.dtype]}"](self._array(*words, torch.get_num_threads()))
        return codes, absmax

    def _integer(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, scale: float
    ) -> torch.Tensor:
        count, columns = x.shape
        rows = weight.shape[0]
        y = torch.empty(count, rows)
        numbers = torch.empty(count * columns, dtype=torch.int16)
        x_scales = torch.empty(count * columns // 64)
        (bits,) = struct.unpack("i", struct.pack("f", scale))
        words = (
            x.data_ptr(), weight.data_ptr(), scales.data_ptr(), y.data_ptr(), rows, columns, count,
            numbers.data_ptr(), x_scales.data_ptr(), bits, torch.get_num_threads(),
        )  # fmt: skip
        self._functions[name](self._array(*words))
        return y


def cpu_kernels() -> CpuKernels | None:
    """Return the kernels, compiled and checked against torch on first use, or None with an event that says why."""
    with _lock:
        if not _found:
            _found.append(_make())
        return _found[0]


def why_not() -> str | None:
    """Return why this machine cannot have the kernels, as far as a look at it tells; None when it can."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"this CPU's vector unit is {torch.backends.cpu.get_cpu_capability()}, and they need AVX2 on x86"
    if not openmp_symbols():
        return "torch's OpenMP runtime has no GNU entry points here"
    return None


def _make() -> CpuKernels | None:
    reason = why_not()
    if reason is None:
        try:
            kernels = CpuKernels()
            reason = _wrong(kernels)
            if reason is None:
                return kernels
        except Exception as error:  # noqa: BLE001 - whatever LLVM cannot do here, torch can do slowly
            reason = f"{type(error).__name__}: {error}"
    emit("kernels.warning", reason=reason, instead="dequantise, then torch's products")
    return None


def _wrong(kernels: CpuKernels) -> str | None:
    """Compare each product with torch on a small matrix; return what disagrees, or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 192, generator=generator)
    weight = torch.randn(37, 192, generator=generator)
    for dtype in _NAMES:
        if not torch.allclose(kernels.dense(x, weight.to(dtype)), x @ weight.to(dtype).float().T, atol=1e-3):
            return f"the {dtype} product disagrees with torch"
    from ..reference import dequantize_nf4

    codes, absmax = kernels.quantize_nf4(weight)
    half = absmax.half()
    if not torch.allclose(kernels.nf4(x, codes, half, 1.0), x @ dequantize_nf4(codes, half, 1.0).T, atol=2e-2):
        return "the nf4 product disagrees with torch"
    whole = (weight * 20).round().clamp(-127, 127).to(torch.int8)
    scales = torch.rand(37, generator=generator)
    if not torch.allclose(kernels.int8(x, whole, scales), x @ (whole.float() * scales[:, None]).T, atol=2e-1):
        return "the int8 product disagrees with torch"
    return None
