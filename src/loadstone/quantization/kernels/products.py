"""y = x·Wᵀ for weights kept in 4 bits, 8 bits, or as floats: the loops that read every weight once.

4 and 8 bits are multiplied in integers, by `wide.py` where the processor has 512-bit ones, and else here. Each block
of 64 activations is scaled to 15 bits; an NF4 code becomes a 15-bit number through two byte look-ups (PSHUFB), an int4
code one of 5 bits by a difference; PMADDWD adds pairs of products in 32 bits. Eight products of 16383² fit a 32-bit
sum, so nothing overflows and nothing is rounded inside a block: against float32 the result is off by about 6e-5, a
fiftieth of what bfloat16 activations cost.

What a decoder does just before and after a product is done here too, while the numbers are at hand: `name.normed`
takes RMS-normed rows of x, `name.gated` takes silu(gate)·up of rows [gate, up]; a bias and a residual are added to y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadstone.quantization.codes import BLOCK, NF4, ZERO_STEPS

from ._llvm import F16, F32, I8, I16, I32, I64, Kernel, as_float32, constants, vector
from .activations import BEFORE, prepare
from .wide import build_wide_products
from .words import ProductWords

LIMIT = 16383  # 15 bits: eight products of two such numbers fit a signed 32-bit sum
TILE = 16  # rows of W that stay in the cache while all rows of x pass by
ROWS_AT_ONCE = (4, 2, 1)

# PUNPCKL/HBW interleave bytes within each half of a 256-bit register; codes of even columns are in the high
# nibbles. ORDER lists the columns of a block in the order in which the products meet them.
_LOW = [index for half in (0, 16) for j in range(8) for index in (half + j, 32 + half + j)]
_HIGH = [index for half in (0, 16) for j in range(8, 16) for index in (half + j, 32 + half + j)]
ORDER = [2 * (half + eight + j) + odd for odd in (0, 1) for eight in (0, 8) for half in (0, 16) for j in range(8)]


@dataclass(frozen=True)
class Narrow:
    """How a kind of weights is unpacked: `unpack` takes a row's address, a block and what is beside it, and returns 64
    weights as four vectors of 16-bit numbers, in `order`."""

    name: str
    bits: int  # a weight
    order: list[int]  # the columns of a block, in the order of the numbers
    unpack: Callable[[Kernel, Any, Any, Any], list[Any]]
    side: int = 0  # bytes beside a block of a row: nothing, its scale, or its group's scale and zero point
    unit: float = 1.0  # how many of its numbers are 1


def build_products(module: Any, *, is_wide: bool) -> None:
    """Add `nf4`, `int4`, `int8` and the float types to the module, each plain, `.normed` and `.gated`."""
    if is_wide:
        build_wide_products(module)
    else:
        _integer_product(module, Narrow("nf4", 4, ORDER, _nf4_block, side=2, unit=LIMIT))
        _integer_product(module, Narrow("int4", 4, ORDER, _int4_block, side=4, unit=ZERO_STEPS))
        _integer_product(module, Narrow("int8", 8, list(range(BLOCK)), _int8_block))
    for name, size in (("float32", 4), ("bfloat16", 2), ("float16", 2)):
        _float_product(module, name, size)


def _nf4_block(k: Kernel, row: Any, block: Any, beside: Any) -> list[Any]:
    table = [round(value * LIMIT) for value in NF4]
    low = constants(I8, [number & 255 for number in table] * 2)
    high = constants(I8, [(number >> 8) & 255 for number in table] * 2)
    nibble = constants(I8, [15] * 32)
    pairs = k.get(row, k.mul(block, I64(32)), vector(I8, 32))
    shifted = k.lshr(k.bitcast(pairs, vector(I16, 16)), constants(I16, [4] * 16))
    weights = []
    for codes in (k.and_(k.bitcast(shifted, vector(I8, 32)), nibble), k.and_(pairs, nibble)):
        bytes_low = k.intrinsic("llvm.x86.avx2.pshuf.b", vector(I8, 32), low, codes)
        bytes_high = k.intrinsic("llvm.x86.avx2.pshuf.b", vector(I8, 32), high, codes)
        weights += [k.bitcast(k.pick(bytes_low, bytes_high, order), vector(I16, 16)) for order in (_LOW, _HIGH)]
    return weights


def _int4_block(k: Kernel, row: Any, block: Any, beside: Any) -> list[Any]:
    zero = k.splat(k.fptosi(k.fmul(beside, F32(float(ZERO_STEPS))), I16), 16)
    nothing, high = constants(I8, [0] * 32), constants(I8, [15 * ZERO_STEPS] * 32)
    pairs = k.get(row, k.mul(block, I64(32)), vector(I8, 32))
    shifted = k.bitcast(k.shl(k.bitcast(pairs, vector(I16, 16)), constants(I16, [4] * 16)), vector(I8, 32))
    weights = []
    for codes in (k.and_(pairs, high), k.and_(shifted, high)):
        numbers = [k.bitcast(k.pick(codes, nothing, order), vector(I16, 16)) for order in (_LOW, _HIGH)]
        weights += [k.sub(number, zero) for number in numbers]
    return weights


def _int8_block(k: Kernel, row: Any, block: Any, beside: Any) -> list[Any]:
    start = k.mul(block, I64(BLOCK))
    parts = [k.get(row, k.add(start, I64(16 * part)), vector(I8, 16)) for part in range(4)]
    return [k.sext(part, vector(I16, 16)) for part in parts]


def _integer_product(module: Any, form: Narrow) -> None:
    rows = {count: _integer_rows(module, f"{form.name}.rows{count}", form, count) for count in ROWS_AT_ONCE}
    worker = _tiles(module, f"{form.name}.worker", rows)
    for suffix, before in BEFORE.items():
        scale = prepare(
            module, f"{form.name}.prepare{suffix}", before,
            lambda k, m, c, values: _scaled(k, m, c, values, form.order),
        )  # fmt: skip
        k = Kernel(module, form.name + suffix, ProductWords)
        k.call(scale, [k.arguments])
        k.in_parallel(worker)
        k.done()


def _scaled(k: Kernel, m: Any, c: Any, values: Any, order: list[int]) -> None:
    """Write 64 activations as 15-bit numbers in `order`, and their scale."""
    index = k.add(k.mul(m, k.word("columns")), c)
    most = k.largest(k.magnitude(values))
    factor = k.select(k.fcmp_ordered(">", most, F32(as_float32(1e-30))), k.fdiv(F32(LIMIT), most), F32(0.0))
    rounded = k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), k.fmul(values, k.splat(factor, BLOCK)))
    small = k.trunc(k.fptosi(rounded, vector(I32, BLOCK)), vector(I16, BLOCK))
    k.put(k.pick(small, small, order), k.word("scratch"), index)
    k.put(k.fmul(most, F32(as_float32(1.0 / LIMIT))), k.word("scratch_scales"), k.udiv(index, I64(BLOCK)))


def _put_result(k: Kernel, value: Any, line: Any, row: Any) -> None:
    """Write one number of y, with its bias and residual."""
    place = k.add(k.mul(line, k.word("rows")), row)
    y, bias, residual = k.words("y", "bias", "residual")
    k.put(value, y, place)
    for address, index in ((bias, row), (residual, place)):
        with k.if_then(k.icmp_signed("!=", address, I64(0))):
            k.put(k.fadd(k.get(y, place, F32), k.get(address, index, F32)), y, place)


def _integer_rows(module: Any, name: str, form: Narrow, count: int) -> Any:
    """Multiply rows [r0, r1) of W with `count` rows of x from m0 on."""
    k = Kernel(module, name, ProductWords, extra=3)
    first, last, m0 = k.extra
    weights, scales, columns = k.words("weights", "scales", "columns")
    numbers, x_scales = k.words("scratch", "scratch_scales")
    whole = k.float_word("whole")
    blocks = k.udiv(columns, I64(BLOCK))
    row_bytes = k.udiv(k.mul(columns, I64(form.bits)), I64(8))
    lines = [k.add(m0, I64(j)) for j in range(count)]
    x_rows = [k.add(numbers, k.mul(line, k.mul(columns, I64(2)))) for line in lines]
    scale_rows = [k.add(x_scales, k.mul(line, k.mul(blocks, I64(4)))) for line in lines]

    def row(r: Any) -> None:
        here = k.add(weights, k.mul(r, row_bytes))

        def block(b: Any, *sums: Any) -> list[Any]:
            per_block, beside = _beside(k, form, scales, k.add(k.mul(r, blocks), b))
            values = form.unpack(k, here, b, beside)
            following = []
            for j in range(count):
                total = None
                for part in range(4):
                    place = k.add(k.mul(b, I64(BLOCK)), I64(16 * part))
                    pair = k.intrinsic(
                        "llvm.x86.avx2.pmadd.wd", vector(I32, 8),
                        values[part], k.get(x_rows[j], place, vector(I16, 16)),
                    )  # fmt: skip
                    total = pair if total is None else k.add(total, pair)
                factor = k.get(scale_rows[j], b, F32)
                if per_block is not None:
                    factor = k.fmul(factor, per_block)
                following.append(k.fma(k.sitofp(total, vector(F32, 8)), k.splat(factor, 8), sums[j]))
            return following

        sums = k.loop(I64(0), blocks, 1, block, *[constants(F32, [0.0] * 8)] * count)
        per_row = k.fmul(whole, F32(as_float32(1.0 / form.unit)) if form.side else k.get(scales, r, F32))
        for j in range(count):
            _put_result(k, k.fmul(k.sum(sums[j]), per_row), lines[j], r)

    k.loop(first, last, 1, row)
    return k.done()


def _beside(k: Kernel, form: Narrow, scales: Any, index: Any) -> tuple[Any, Any]:
    """Return the scale of a block by its number in W, and int4's zero point; None where there is none."""
    if form.side == 2:
        return k.fpext(k.get(scales, index, F16), F32), None
    if form.side == 4:
        place = k.mul(k.udiv(index, k.word("group")), I64(2))
        both = k.fpext(k.get(scales, place, vector(F16, 2)), vector(F32, 2))
        return k.extract_element(both, I32(0)), k.extract_element(both, I32(1))
    return None, None


def _float_product(module: Any, name: str, size: int) -> None:
    rows = {count: _float_rows(module, f"{name}.rows{count}", name, size, count) for count in ROWS_AT_ONCE}
    worker = _tiles(module, f"{name}.worker", rows)
    for suffix, before in BEFORE.items():
        k = Kernel(module, name + suffix, ProductWords)
        if suffix:  # plain rows are multiplied where they are: the caller gives x itself as the scratch
            k.call(_float_prepare(module, suffix, before), [k.arguments])
        k.in_parallel(worker)
        k.done()


def _float_prepare(module: Any, suffix: str, before: Any) -> Any:
    name = f"floats.prepare{suffix}"
    if name in module.globals:
        return module.globals[name]

    def write(k: Kernel, m: Any, c: Any, values: Any) -> None:
        k.put(values, k.word("scratch"), k.add(k.mul(m, k.word("columns")), c))

    return prepare(module, name, before, write)


def load_floats(k: Kernel, name: str, base: Any, index: Any, length: int) -> Any:
    """Load `length` numbers of type `name` and widen them to float32."""
    if name == "float32":
        return k.get(base, index, vector(F32, length))
    if name == "float16":
        return k.fpext(k.get(base, index, vector(F16, length)), vector(F32, length))
    bits = k.zext(k.get(base, index, vector(I16, length)), vector(I32, length))
    return k.bitcast(k.shl(bits, constants(I32, [16] * length)), vector(F32, length))


def _float_rows(module: Any, name: str, kind: str, size: int, count: int) -> Any:
    k = Kernel(module, name, ProductWords, extra=3)
    first, last, m0 = k.extra
    x, weights, columns = k.words("scratch", "weights", "columns")
    lines = [k.add(m0, I64(j)) for j in range(count)]
    x_rows = [k.add(x, k.mul(line, k.mul(columns, I64(4)))) for line in lines]

    def row(r: Any) -> None:
        here = k.add(weights, k.mul(r, k.mul(columns, I64(size))))

        def step(c: Any, *sums: Any) -> list[Any]:
            following = []
            for part in range(4):
                place = k.add(c, I64(8 * part))
                values = load_floats(k, kind, here, place, 8)
                for j in range(count):
                    one = sums[4 * j + part]
                    following.append((4 * j + part, k.fma(values, k.get(x_rows[j], place, vector(F32, 8)), one)))
            return [value for _, value in sorted(following, key=lambda item: item[0])]

        sums = k.loop(I64(0), columns, 32, step, *[constants(F32, [0.0] * 8)] * (4 * count))
        for j in range(count):
            a, b, c, d = sums[4 * j : 4 * j + 4]
            _put_result(k, k.sum(k.fadd(k.fadd(a, b), k.fadd(c, d))), lines[j], r)

    k.loop(first, last, 1, row)
    return k.done()


def _tiles(module: Any, name: str, rows: dict[int, Any]) -> Any:
    """Let each thread walk its rows of W in tiles, and for each tile all rows of x in groups."""
    k = Kernel(module, name, ProductWords)
    n, count = k.words("rows", "x_rows")
    start, stop = k.share(n)

    def tile(first: Any) -> None:
        last = k.least(k.add(first, I64(TILE)), stop)
        done = I64(0)
        for group in ROWS_AT_ONCE:

            def some_rows(m: Any, group: int = group) -> None:
                k.call(rows[group], [k.arguments, first, last, m])

            upto = k.and_(count, I64(-group))
            k.loop(done, upto, group, some_rows)
            done = upto

    k.loop(start, stop, TILE, tile)
    return k.done()
