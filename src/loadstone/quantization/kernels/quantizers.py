"""Weights → NF4, int4 or 8 bits, straight from the type that the checkpoint has.

An NF4 code is the number of midpoints between neighbouring NF4 values that the scaled weight lies above, which is what
bitsandbytes' search tree computes. For int4 sixteen numbers are spread over a block's range. In 8 bits a row is scaled
to [-127, 127] and rounded to even.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from loadstone.quantization.codes import BLOCK, NF4

from ._llvm import F32, I8, I32, I64, Kernel, as_float32, constants, vector
from .products import load_floats
from .words import QuantizerWords

SHARE = 64 * 64  # weights that one thread takes at least
KINDS = ("float32", "bfloat16", "float16")


def build_quantizers(module: Any) -> None:
    """Add `quantize_<form>_<type>` for NF4, int4 and 8 bits and each float type to the module."""
    for kind in KINDS:
        _entry(module, f"quantize_nf4_{kind}", _nf4_worker(module, kind))
        _entry(module, f"quantize_int4_{kind}", _int4_worker(module, kind))
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
        _put_codes(k, found, codes, index)
        k.put(most, absmax, k.udiv(index, I64(BLOCK)))

    k.loop(start, stop, BLOCK, block)
    return k.done()


def _put_codes(k: Kernel, found: Any, codes: Any, index: Any) -> None:
    """Write the codes of 64 weights, two a byte."""
    small = k.trunc(found, vector(I8, BLOCK))
    even, odd = (k.pick(small, small, range(first, BLOCK, 2)) for first in (0, 1))
    k.put(k.or_(k.shl(even, constants(I8, [4] * 32)), odd), codes, k.udiv(index, I64(2)))


def _int4_worker(module: Any, kind: str) -> Any:
    k = Kernel(module, f"quantize_int4.{kind}.worker", QuantizerWords)
    weights, codes, scales, zeros = k.words("weights", "numbers", "scales", "zeros")
    start, stop = k.share(k.mul(*k.words("rows", "columns")), SHARE)
    nothing, most_code = constants(F32, [0.0] * BLOCK), constants(F32, [15.0] * BLOCK)

    def above_zero(values: Any) -> Any:
        return k.largest(k.select(k.fcmp_ordered(">", values, nothing), values, nothing))

    def block(index: Any) -> None:
        values = load_floats(k, kind, weights, index, BLOCK)
        most, high, low = k.largest(k.magnitude(values)), above_zero(values), above_zero(k.fneg(values))
        part = F32(as_float32(1 / 15))
        scale = k.fadd(k.fmul(high, part), k.fmul(low, part))
        is_there = k.and_(k.fcmp_ordered(">", scale, F32(as_float32(1e-37))), k.fcmp_ordered("<", most, F32(math.inf)))
        factor = k.select(is_there, k.fdiv(F32(1.0), scale), F32(0.0))
        zero = k.select(is_there, k.intrinsic("llvm.rint.f32", F32, k.fmul(low, factor)), F32(0.0))
        whole = k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), k.fmul(values, k.splat(factor, BLOCK)))
        whole = k.fadd(whole, k.splat(zero, BLOCK))
        whole = k.select(k.fcmp_ordered(">", whole, nothing), whole, nothing)
        whole = k.select(k.fcmp_ordered("<", whole, most_code), whole, most_code)
        _put_codes(k, k.fptosi(whole, vector(I32, BLOCK)), codes, index)
        number = k.udiv(index, I64(BLOCK))
        # What is no number is to be seen in the scale.
        k.put(k.select(k.fcmp_ordered("<", most, F32(math.inf)), scale, most), scales, number)
        k.put(zero, zeros, number)

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
