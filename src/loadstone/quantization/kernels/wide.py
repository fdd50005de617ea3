"""y = x·Wᵀ for 4 and 8 bits with 512-bit vectors: sixteen rows of W at a time, a row a lane.

A few columns of W are unpacked to 16-bit numbers, a panel that stays in the cache while all rows of x pass by.
VPDPWSSD then multiplies two columns of sixteen rows with two activations, and adds in 32 bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from loadstone.quantization.codes import BLOCK, NF4

from .activations import BEFORE, prepare
from ._llvm import F16, F32, I8, I16, I32, I64, VOID, Kernel, as_float32, constants, vector
from .words import ProductWords

LANES = 16
GROUPS = (8, 4, 2, 1)  # rows of x at once
AHEAD = 16
DIRECT=(4,2,1)
FEW = 8
TILE = 128
CHUNK = 256
PARTS = 2
PAIRS = BLOCK // 2
TOP = 32767
TABLE = 8357.0
ZERO = constants(F32, [0.0] * LANES)


def build_wide_products(module: Any) -> None:
    multiply = {count: _multiply(module, count) for count in GROUPS}
    _product(module, "nf4", _nf4_block, multiply, round(TABLE), 4, NF4_ORDER)
    _product(module, "int8", _int8_block, multiply, 128, 8, INT8_ORDER)


def _nf4_column(word: int, nibble: int) -> int:
    return 8 * word + (nibble ^ 1)


NF4_ORDER = [
    _nf4_column(word, shift + 4 * odd) for word in range(8) for shift in range(4) for odd in (0, 1)
]
INT8_ORDER = [4 * word + shift + 2 * odd for word in range(16) for shift in (0, 1) for odd in (0, 1)]


def _product(module: Any, name: str, unpack: Any, multiply: Any, largest: int, bits: int, order: list[int]) -> None:
    fill = _fill(module, f"{name}.fill", unpack, bits)
    direct = {count: _direct(module, f"{name}.direct{count}", unpack, bits, count) for count in DIRECT}
    workers = {TILE: _many(module, f"{name}.many", fill, multiply, bits), LANES: _few(module, f"{name}.few", direct)}
    for suffix, before in BEFORE.items():
        scale = prepare(
            module, f"{name}.prepare{suffix}", before,
            lambda k, m, c, values: _scaled(k, m, c, values, order, largest),
        )
        k = Kernel(module, name + suffix, ProductWords)
        is_many = k.icmp_signed(">=", k.word("x_rows"), I64(FEW))
        with k.if_else(is_many) as (many, few):
            with many:
                k.in_parallel(scale)
                k.in_parallel(workers[TILE])
            with few:
                k.call(scale, [k.arguments])
                k.in_parallel(workers[LANES])
        k.done()


def _scaled(k: Kernel, m: Any, c: Any, values: Any, order: list[int], largest: int) -> None:
    columns, count = k.words("columns", "x_rows")
    size = k.select(k.icmp_signed("<", m, k.and_(count, I64(-2))), I64(2), I64(1))
    for group in sorted(GROUPS)[2:]:
        size = k.select(k.icmp_signed("<", m, k.and_(count, I64(-group))), I64(group), size)
    first = k.and_(m, k.sub(I64(0), size))
    here = k.sub(m, first)
    found = k.magnitude(values)
    bounds = [k.fmul(k.largest(found), F32(as_float32(1.0 / TOP)))]
    limit = (2**31 - 1) // largest - 32
    half = BLOCK // PARTS
    # which columns make a half: by order
    for part in range(PARTS):
        total = k.sum(k.pick(found, found, sorted(order[part * half : (part + 1) * half])))
        bounds.append(k.fmul(total, F32(as_float32(1.0 / limit))))
    both = ir.Constant(vector(F32, 4), [ir.Constant(F32, 0.0)] * 4)
    for i, bound in enumerate(bounds):
        both = k.insert_element(both, bound, I32(i))
    step = k.largest(both)
    factor = k.select(k.fcmp_ordered(">", step, F32(as_float32(1e-34))), k.fdiv(F32(1.0), step), F32(0.0))
    rounded = k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), k.fmul(values, k.splat(factor, BLOCK)))
    small = k.trunc(k.fptosi(rounded, vector(I32, BLOCK)), vector(I16, BLOCK))
    pairs = k.bitcast(k.pick(small, small, order), vector(I32, PAIRS))
    at = k.add(k.word("scratch"), k.mul(first, k.mul(columns, I64(2))))
    index = k.add(k.mul(k.udiv(c, I64(2)), size), here)
    with k.if_else(k.icmp_signed("==", size, I64(1))) as (alone, among):
        with alone:
            k.put(pairs, at, index)
        with among:
            for pair in range(PAIRS):
                k.put(k.extract_element(pairs, I32(pair)), at, k.add(index, k.mul(size, I64(pair))))
    blocks = k.udiv(columns, I64(BLOCK))
    at = k.add(k.word("scratch_scales"), k.mul(first, k.mul(blocks, I64(4))))
    k.put(step, at, k.add(k.mul(k.udiv(c, I64(BLOCK)), size), here))


def _turned(k: Kernel, rows: list[Any], index: Any) -> list[Any]:
    """Return eight vectors: the n-th has the n-th 32-bit word from `index` on of sixteen rows."""
    quarters = []
    for base in (0, 8):
        two = [
            k.pick(k.get(rows[base + i], index, vector(I32, 8)), k.get(rows[base + 4 + i], index, vector(I32, 8)),
                   range(16))
            for i in range(4)
        ]
        low = [4 * lane + i + 16 * other for lane in range(4) for i in (0, 1) for other in (0, 1)]
        high = [i + 2 for i in low]
        mixed = [k.pick(two[a], two[a + 1], order) for order in (low, high) for a in (0, 2)]
        first = [4 * lane + i + 16 * other for lane in range(4) for other in (0, 1) for i in (0, 1)]
        second = [i + 2 for i in first]
        quarters.append([k.pick(mixed[a], mixed[a + 1], order) for a in (0, 2) for order in (first, second)])
    even = [4 * lane + i + 16 * other for other in (0, 1) for lane in (0, 2) for i in range(4)]
    odd = [i + 4 for i in even]
    return [k.pick(quarters[0][q], quarters[1][q], order) for order in (even, odd) for q in range(4)]


def _rows(k: Kernel, base: Any, first: Any, size: Any) -> list[Any]:
    last = k.sub(k.word("rows"), I64(1))
    return [k.add(base, k.mul(k.least(k.add(first, I64(i)), last), size)) for i in range(LANES)]


def _ask_ahead(k: Kernel, rows: list[Any], b: Any, size: int, tile: int, ahead: int) -> None:
    """Ask for what the rows hold a little later, or where they end, for what the next tile begins with."""
    whole = k.mul(k.udiv(k.word("columns"), I64(BLOCK)), I64(size))
    here = k.add(k.mul(b, I64(size)), I64(ahead * size))
    here = k.select(k.icmp_signed(">=", here, whole), k.add(here, k.mul(whole, I64(tile - 1))), here)
    for row in rows:
        k.prefetch(k.add(row, here))


def _nf4_block(k: Kernel, rows: list[Any], scales: list[Any], b: Any, tile: int, ahead: int) -> tuple[list[Any], Any]:
    """Return a block of 64 columns, two a vector, and the rows' scales."""
    table = constants(I16, [round(value * TABLE) for value in NF4] * 2)
    _ask_ahead(k, rows, b, 32, tile, ahead)
    pairs = []
    for word in _turned(k, rows, k.mul(b, I64(8))):
        for shift in range(4):
            moved = k.lshr(word, constants(I32, [4 * shift] * LANES)) if shift else word
            codes = k.bitcast(moved, vector(I16, 32))
            pairs.append(k.intrinsic("llvm.x86.avx512.permvar.hi.512", vector(I16, 32), table, codes))
    bits = ir.Constant(vector(I16, LANES), ir.Undefined)
    for i in range(LANES):
        bits = k.insert_element(bits, k.get(scales[i], b, I16), I32(i))
    return [k.bitcast(one, vector(I32, LANES)) for one in pairs], k.fpext(k.bitcast(bits, vector(F16, LANES)), vector(F32, LANES))


def _int8_block(k: Kernel, rows: list[Any], scales: list[Any], b: Any, tile: int, ahead: int) -> tuple[list[Any], Any]:
    eight = constants(I16, [8] * 32)
    pairs = []
    _ask_ahead(k, rows, b, 64, tile, ahead)
    for part in (0, 1):
        for word in _turned(k, rows, k.add(k.mul(b, I64(16)), I64(8 * part))):
            numbers = k.bitcast(word, vector(I16, 32))
            pairs += [k.ashr(k.shl(numbers, eight), eight), k.ashr(numbers, eight)]
    return [k.bitcast(one, vector(I32, LANES)) for one in pairs], constants(F32, [1.0] * LANES)


def _sources(k: Kernel, first: Any, bits: int) -> tuple[list[Any], list[Any]]:
    columns = k.word("columns")
    rows = _rows(k, k.word("weights"), first, k.udiv(k.mul(columns, I64(bits)), I64(8)))
    scales = _rows(k, k.word("scales"), first, k.udiv(columns, I64(BLOCK // 2))) if bits == 4 else []
    return rows, scales


def _fill(module: Any, name: str, unpack: Any, bits: int) -> Any:
    k = Kernel(module, name, ProductWords, extra=5)
    first, b0, count, panel, factors = k.extra
    rows, scales = _sources(k, first, bits)

    def block(b: Any) -> None:
        pairs, factor = unpack(k, rows, scales, k.add(b0, b), TILE, CHUNK // BLOCK)
        at = k.add(panel, k.mul(b, I64(PAIRS * LANES * 4)))
        for i, pair in enumerate(pairs):
            k.put(pair, at, I64(LANES * i))
        k.put(factor, factors, k.mul(b, I64(LANES)))

    k.loop(I64(0), count, 1, block)
    return k.done()


def _block(k: Kernel, weights: Any, factor: Any, x: Any, x_scales: Any, totals: Any) -> list[Any]:
    count, kind = len(totals), vector(I32, LANES)
    parts = []
    for part in range(PARTS):
        found = [constants(I32, [0] * LANES)] * count
        for pair in range(part * PAIRS // PARTS, (part + 1) * PAIRS // PARTS):
            numbers = weights(pair)
            for j in range(count):
                one = k.splat(k.get(x, I64(count * pair + j), I32), LANES)
                found[j] = k.intrinsic("llvm.x86.avx512.vpdpwssd.512", kind, found[j], numbers, one)
        parts.append([k.sitofp(one, vector(F32, LANES)) for one in found])
    following = []
    for j in range(count):
        total = parts[0][j]
        for part in parts[1:]:
            total = k.fadd(total, part[j])
        scale = k.splat(k.get(x_scales, I64(j), F32), LANES)
        following.append(k.fma(k.fmul(total, factor()), scale, totals[j]))
    return following


def _multiply(module: Any, count: int) -> Any:
    """Multiply a panel with some rows of x."""
    k = Kernel(module, f"wide.rows{count}", ProductWords, extra=6)
    panel, factors, x, x_scales, sums, blocks = k.extra

    def block(b: Any, *totals: Any) -> list[Any]:
        at = k.add(panel, k.mul(b, I64(PAIRS * LANES * 4)))
        return _block(
            k, lambda pair: k.get(at, I64(LANES * pair), vector(I32, LANES)),
            lambda: k.get(factors, k.mul(b, I64(LANES)), vector(F32, LANES)),
            k.add(x, k.mul(b, I64(PAIRS * 4 * count))), k.add(x_scales, k.mul(b, I64(4 * count))), totals,
        )

    before = [k.get(sums, I64(LANES * j), vector(F32, LANES)) for j in range(count)]
    totals = k.loop(I64(0), blocks, 1, block, *before)
    for j in range(count):
        k.put(totals[j], sums, I64(LANES * j))
    return k.done()


def _direct(module: Any, name: str, unpack: Any, bits: int, count: int) -> Any:
    """Multiply 16 rows with some rows of x, without a panel."""
    k = Kernel(module, name, ProductWords, extra=2)
    first, m = k.extra
    columns, scratch, x_scales = k.words("columns", "scratch", "scratch_scales")
    rows, scales = _sources(k, first, bits)
    blocks = k.udiv(columns, I64(BLOCK))
    x = k.add(scratch, k.mul(m, k.mul(columns, I64(2))))
    x_scales = k.add(x_scales, k.mul(m, k.mul(blocks, I64(4))))

    def block(b: Any, *totals: Any) -> list[Any]:
        pairs, factor = unpack(k, rows, scales, b, LANES, AHEAD)
        return _block(
            k, lambda pair: pairs[pair], lambda: factor,
            k.add(x, k.mul(b, I64(PAIRS * 4 * count))), k.add(x_scales, k.mul(b, I64(4 * count))), totals,
        )

    totals = k.loop(I64(0), blocks, 1, block, *[ZERO] * count)
    for j in range(count):
        _put(k, bits, first, k.add(m, I64(j)), totals[j])
    return k.done()


def _few(module: Any, name: str, direct: dict[int, Any]) -> Any:
    k = Kernel(module, name, ProductWords)
    start, stop = k.share(k.word("rows"), LANES)
    count = k.word("x_rows")

    def rows(first: Any) -> None:
        done = I64(0)
        for group, product in direct.items():
            upto = k.and_(count, I64(-group))
            k.loop(done, upto, group, lambda m, product=product: k.call(product, [k.arguments, first, m]) and None)
            done = upto

    k.loop(start, stop, LANES, rows)
    return k.done()


def _many(module: Any, name: str, fill: Any, multiply: Any, bits: int) -> Any:
    k = Kernel(module, name, ProductWords)
    n, count, columns, scratch, x_scales = k.words("rows", "x_rows", "columns", "scratch", "scratch_scales")
    start, stop = k.share(n, LANES)
    thread = k.sext(k.intrinsic("omp_get_thread_num", I32), I64)
    sums = k.add(k.word("sums"), k.mul(thread, k.mul(count, I64(4 * TILE))))
    panel_size, factors_size = CHUNK * LANES * 2, CHUNK // BLOCK * LANES * 4
    space = k.alloca(ir.ArrayType(I8, panel_size + factors_size))
    space.align = 64
    panel = k.ptrtoint(space, I64)
    factors = k.add(panel, I64(panel_size))
    blocks = k.udiv(columns, I64(BLOCK))

    def one_tile(first: Any) -> None:
        last = k.least(k.add(first, I64(TILE)), stop)
        parts = k.udiv(k.add(k.sub(last, first), I64(LANES - 1)), I64(LANES))
        k.loop(I64(0), k.mul(parts, count), 1, lambda i: k.put(ZERO, sums, k.mul(i, I64(LANES))))

        def chunk(b0: Any) -> None:
            here = k.least(k.sub(blocks, b0), I64(CHUNK // BLOCK))

            def one_part(part: Any) -> None:
                k.call(fill, [k.arguments, k.add(first, k.mul(part, I64(LANES))), b0, here, panel, factors])
                done = I64(0)
                for group in GROUPS:
                    def some(m: Any, group: int = group) -> None:
                        x = k.add(scratch, k.add(k.mul(m, k.mul(columns, I64(2))), k.mul(b0, I64(BLOCK * 2 * group))))
                        scales = k.add(x_scales, k.mul(k.add(k.mul(m, blocks), k.mul(b0, I64(group))), I64(4)))
                        k.call(multiply[group], [
                            k.arguments, panel, factors, x, scales,
                            k.add(sums, k.mul(k.add(k.mul(part, count), m), I64(4 * LANES))), here,
                        ])

                    upto = k.and_(count, I64(-group))
                    k.loop(done, upto, group, some)
                    done = upto

            k.loop(I64(0), parts, 1, one_part)

        k.loop(I64(0), blocks, CHUNK // BLOCK, chunk)

        def finish(part: Any) -> None:
            r = k.add(first, k.mul(part, I64(LANES)))
            def line(m):
                at = k.mul(k.add(k.mul(part, count), m), I64(LANES))
                _put(k, bits, r, m, k.get(sums, at, vector(F32, LANES)))
            k.loop(I64(0), count, 1, line)

        k.loop(I64(0), parts, 1, finish)

    k.loop(start, stop, TILE, one_tile)
    return k.done()


def _put(k: Kernel, bits: int, r: Any, m: Any, value: Any) -> None:
    n = k.word("rows")
    left = k.splat(k.trunc(k.sub(n, r), I32), LANES)
    mask = k.icmp_signed("<", constants(I32, list(range(LANES))), left)
    kind = vector(F32, LANES)

    def load(base: Any, index: Any) -> Any:
        place = k._place(base, index, kind)
        return k.intrinsic("llvm.masked.load.v16f32.p0", kind, place, I32(1), mask, ZERO)

    factor = k.splat(k.fmul(k.float_word("whole"), F32(as_float32(1.0 / TABLE))), LANES)
    if bits == 8:
        factor = k.fmul(k.splat(k.float_word("whole"), LANES), load(k.word("scales"), r))
    value = k.fmul(value, factor)
    place = k.add(k.mul(m, n), r)
    y, bias, residual = k.words("y", "bias", "residual")

    def put(value: Any) -> None:
        k.intrinsic("llvm.masked.store.v16f32.p0", VOID, value, k._place(y, place, kind), I32(1), mask)

    put(value)
    for address, index in ((bias, r), (residual, place)):
        with k.if_then(k.icmp_signed("!=", address, I64(0))):
            put(k.fadd(load(y, place), load(address, index)))
