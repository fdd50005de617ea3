"""Weights → NF4, int4 or 8 bits, straight from the type that the checkpoint has.

An NF4 code is the number of midpoints between neighbouring NF4 values that the scaled weight lies above, which is what
bitsandbytes' search tree computes. For int4 sixteen numbers are spread over several ranges. In 8 bits a row is scaled
to [-127, 127] and rounded to even.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from loadstone.quantization.codes import BLOCK, NF4, RANGES, ZERO_STEPS

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

    def block(index: Any) -> None:
        values = load_floats(k, kind, weights, index, BLOCK)
        most = k.largest(k.magnitude(values))
        is_number = k.fcmp_ordered("<", most, F32(math.inf))
        is_there = k.and_(is_number, k.fcmp_ordered(">", most, F32(as_float32(1e-37))))
        # From here on the largest is 1, so that no square is too large or too small.
        part = k.fmul(values, k.splat(k.select(is_there, k.fdiv(F32(1.0), most), F32(0.0)), BLOCK))
        scale, zero, found = _int4_codes(k, part)
        _put_codes(k, found, codes, index)
        number = k.udiv(index, I64(BLOCK))
        k.put(k.select(is_number, k.fmul(scale, most), most), scales, number)  # what is no number is to be seen
        k.put(zero, zeros, number)

    k.loop(start, stop, BLOCK, block)
    return k.done()


def _int4_codes(k: Kernel, values: Any) -> tuple[Any, Any, Any]:
    """Return the scale, the zero point and the codes of 64 weights up to 1, of all ranges those with the least error.

    Errors are weighed by the weights' own magnitudes.
    """
    nothing, fifteen = constants(F32, [0.0] * BLOCK), constants(F32, [15.0] * BLOCK)
    sides = []
    for side, shares in zip((k.fneg(values), values), zip(*RANGES, strict=True), strict=True):
        most = k.largest(k.select(k.fcmp_ordered(">", side, nothing), side, nothing))
        sides.append((most, constants(F32, [as_float32(share / 15) for share in shares])))
    magnitudes = k.magnitude(values)

    def codes_of(factor: Any, zero: Any) -> Any:
        whole = k.fadd(k.fmul(values, k.splat(factor, BLOCK)), k.splat(zero, BLOCK))
        whole = k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), whole)
        whole = k.select(k.fcmp_ordered(">", whole, nothing), whole, nothing)
        return k.select(k.fcmp_ordered("<", whole, fifteen), whole, fifteen)

    def one_range(number: Any, *best: Any) -> list[Any]:
        below, above = (k.fmul(side, k.extract_element(share, number)) for side, share in sides)
        scale = k.fadd(below, above)
        factor = k.select(k.fcmp_ordered(">", scale, F32(0.0)), k.fdiv(F32(1.0), scale), F32(0.0))
        steps = k.intrinsic("llvm.rint.f32", F32, k.fmul(k.fmul(below, factor), F32(15.0 * ZERO_STEPS)))
        zero = k.fmul(steps, F32(1.0 / ZERO_STEPS))
        off = k.fmul(k.fsub(codes_of(factor, zero), k.splat(zero, BLOCK)), k.splat(scale, BLOCK))
        off = k.fsub(off, values)
        found = (k.sum(k.fmul(k.fmul(off, off), magnitudes)), scale, factor, zero)
        is_better = k.fcmp_ordered("<", found[0], best[0])
        return [k.select(is_better, *pair) for pair in zip(found, best, strict=True)]

    worst = (F32(math.inf), F32(0.0), F32(0.0), F32(0.0))
    _, scale, factor, zero = k.loop(I64(0), I64(len(RANGES)), 1, one_range, *worst)
    return scale, zero, k.fptosi(codes_of(factor, zero), vector(I32, BLOCK))


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
