"""Weights → NF4 codes and absmax, 64 at a time, straight from the type that the checkpoint has.

A code is the number of midpoints between neighbouring NF4 values that the scaled weight lies above, which is what
bitsandbytes' search tree computes. Argument words: 0 weights (M × K, flat), 1 codes (uint8, two a byte, the first
in the high nibble), 2 absmax (float32, one for 64), 3 how many weights, 10 threads.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from loadstone.quantization.codes import BLOCK, NF4

from ._llvm import F32, I8, I32, I64, Kernel, as_float32, constants, vector
from .products import load_floats

SHARE = 64 * 64  # weights that one thread takes at least
KINDS = ("float32", "bfloat16", "float16")


def build_quantizers(module: Any) -> None:
    """Add `quantize_nf4_<type>` for each float type to the module."""
    for kind in KINDS:
        _quantizer(module, kind)


def _quantizer(module: Any, kind: str) -> None:
    k = Kernel(module, f"quantize.{kind}.worker")
    weights, codes, absmax, count = (k.argument(index) for index in range(4))
    start, stop = k.share(count, SHARE)
    middles = [(a + b) / 2 for a, b in pairwise(NF4)]

    def block(index: Any) -> None:
        values = load_floats(k, kind, weights, index, BLOCK)
        most = k.largest(k.magnitude(values))
        factor = k.select(k.fcmp_ordered(">", most, F32(0.0)), k.fdiv(F32(1.0), most), F32(0.0))
        scaled = k.fmul(values, k.splat(factor, BLOCK))
        found = constants(I32, [0] * BLOCK)
        for middle in middles:
            above = k.fcmp_ordered(">", scaled, k.splat(F32(as_float32(middle)), BLOCK))
            found = k.sub(found, k.sext(above, vector(I32, BLOCK)))
        small = k.trunc(found, vector(I8, BLOCK))
        even = k.pick(small, small, range(0, BLOCK, 2))
        odd = k.pick(small, small, range(1, BLOCK, 2))
        k.put(k.or_(k.shl(even, constants(I8, [4] * 32)), odd), codes, k.udiv(index, I64(2)))
        k.put(most, absmax, k.udiv(index, I64(BLOCK)))

    k.loop(start, stop, BLOCK, block)
    worker = k.done()
    entry = Kernel(module, f"quantize_nf4_{kind}")
    entry.in_parallel(worker, entry.argument(10))
    entry.done()
