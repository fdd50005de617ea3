"""What is done to x before a product, a block of 64 activations at a time: nothing, an RMS norm, or a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loadstone.quantization.codes import BLOCK

from ._llvm import F32, I64, Kernel, constants, vector
from .words import ProductWords

# What is done to x before the product: each takes (kernel, row, K) and returns what gives 64 values from column c.
Values = Callable[[Any], Any]


def _plain(k: Kernel, m: Any, columns: Any) -> Values:
    x = k.add(k.word("x"), k.mul(m, k.mul(columns, I64(4))))
    return lambda c: k.get(x, c, vector(F32, BLOCK))


def _normed(k: Kernel, m: Any, columns: Any) -> Values:
    values, weights = _plain(k, m, columns), k.word("norm")
    zeros = constants(F32, [0.0] * BLOCK)
    squares = k.loop(I64(0), columns, BLOCK, lambda c, total: [k.fma(values(c), values(c), total)], zeros)[0]
    mean = k.fdiv(k.sum(squares), k.sitofp(columns, F32))
    root = k.intrinsic("llvm.sqrt.f32", F32, k.fadd(mean, k.float_word("epsilon")))
    factor = k.splat(k.fdiv(F32(1.0), root), BLOCK)
    return lambda c: k.fmul(k.fmul(values(c), factor), k.get(weights, c, vector(F32, BLOCK)))


def _gated(k: Kernel, m: Any, columns: Any) -> Values:
    gate = k.add(k.word("x"), k.mul(m, k.mul(columns, I64(8))))
    up = k.add(gate, k.mul(columns, I64(4)))
    one = constants(F32, [1.0] * BLOCK)

    def values(c: Any) -> Any:
        opened = k.get(gate, c, vector(F32, BLOCK))
        silu = k.fdiv(opened, k.fadd(one, k.exponential(k.fneg(opened))))
        return k.fmul(silu, k.get(up, c, vector(F32, BLOCK)))

    return values


BEFORE = {"": _plain, ".normed": _normed, ".gated": _gated}


def prepare(module: Any, name: str, before: Any, write: Any) -> Any:
    """Write the activations that the product is to meet, a block of 64 at a time."""
    k = Kernel(module, name, ProductWords)
    columns, count = k.words("columns", "x_rows")
    start, stop = k.share(count)

    def row(m: Any) -> None:
        values = before(k, m, columns)
        k.loop(I64(0), columns, BLOCK, lambda c: write(k, m, c, values(c)))

    k.loop(start, stop, 1, row)
    return k.done()
