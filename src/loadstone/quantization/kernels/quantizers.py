"""Weights → NF4 or 8 bits, straight from the type that the checkpoint has.

An NF4 code is the number of midpoints between neighbouring NF4 values that the scaled weight lies above, which is what
bitsandbytes' search tree computes. In 8 bits a row is scaled to [-127, 127] and rounded to even.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from loadstone.quantization.codes import BLOCK, NF4

from ._llvm import F32, I8, I32, I64, Kernel, as_float32, constants, vector
from .products import load_floats
from .words import QuantizerWords

SHARE = 64 * 64  # weights that one thread takes at least
KINDS = ("float32", "bfloat16", "float16")


def build_quantizers(module: Any) -> None:
    """Add `quantize_nf4_<type>` and `quantize_int8_<type>` for each float type to the module."""
    for kind in KINDS:
        _entry(module, f"quantize_nf4_{kind}", _nf4_worker(module, kind))
        _entry(module, f"quantize_int8_{kind}", _int8_worker(module, kind))


def _entry(module: Any, name: str, worker: Any) -> None:
    k = Kernel(module, name, QuantizerWords)
    k.in_parallel(worker)
    k.done()


def _nf4_worker(module: Any, kind: str) -> Any:
    k = Kernel(module, f"quantize_nf4.{kind}.worker", QuantizerWords)
    weights, codes, absmax, rows, columns = k.words("weights", "numbers", "scales", "rows", "columns")
    count = k.mul(rows, columns)
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
    return k.done()


def _int8_worker(module: Any, kind: str) -> Any:
    k = Kernel(module, f"quantize_int8.{kind}.worker", QuantizerWords)
    weights, numbers, scales, rows, columns = k.words("weights", "numbers", "scales", "rows", "columns")
    start, stop = k.share(rows)
    zeros = constants(F32, [0.0] * BLOCK)

    def row(r: Any) -> None:
        at = k.mul(r, columns)

        def widest(c: Any, so_far: Any) -> list[Any]:
            found = k.magnitude(load_floats(k, kind, weights, k.add(at, c), BLOCK))
            bits = [k.bitcast(one, vector(I32, BLOCK)) for one in (found, so_far)]  # in order; NaN above all
            return [k.select(k.icmp_unsigned(">", *bits), found, so_far)]

        most = k.largest(k.loop(I64(0), columns, BLOCK, widest, zeros)[0])
        factor = k.select(k.fcmp_ordered(">", most, F32(0.0)), k.fdiv(F32(127.0), most), F32(0.0))

        def block(c: Any) -> None:
            values = load_floats(k, kind, weights, k.add(at, c), BLOCK)
            scaled = k.fmul(values, k.splat(factor, BLOCK))
            whole = k.fptosi(k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), scaled), vector(I32, BLOCK))
            k.put(k.trunc(whole, vector(I8, BLOCK)), numbers, k.add(at, c))

        k.loop(I64(0), columns, BLOCK, block)
        k.put(k.fdiv(most, F32(127.0)), scales, r)

    k.loop(start, stop, 1, row)
    return k.done()
