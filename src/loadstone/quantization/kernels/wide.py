"""y = x·Wᵀ for 4 and 8 bits with 512-bit integers (AVX512 with VNNI): sixteen rows of W at a time, a row a lane.

With few rows of x, W is multiplied as it is unpacked. With many, some columns of it are unpacked into a panel that
stays in the cache while all rows of x pass by, and half the products are made sums, for which there are twice as many
units (Winograd, 1968): x₀w₀ + x₁w₁ = (x₀ + w₁)(x₁ + w₀) - x₀x₁ - w₀w₁. What is taken off is summed once for each row
of x and once for each of W, not for each pair of them.

Both ways find the same integer: sums wrap in 32 bits, but that of a block of 64 fits. A row of x is scaled, block by
block, so that it does whatever W is; and numbers of x and W together fit 16 bits.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from loadstone.quantization.codes import BLOCK, LANES

from ._llvm import F32, I16, I32, I64, Kernel, as_float32, constants, vector
from .activations import BEFORE, prepare
from .unpacking import FORMS, PAIRS, Form, Rows
from .words import SUMS, ProductWords

AT_ONCE = 8  # rows of x that are multiplied together; what is left is one smaller group
SIZES = range(1, AT_ONCE + 1)
MANY = 9  # rows of x from which on a panel pays
CHUNK = 8  # blocks in a panel: 16 KB, half of a core's nearest cache
CROSSED = 4  # rows of x from which on Winograd's way pays without a panel
SUMS_AT_ONCE = 4  # at least, so that an addition need not wait for the last

FLOATS, INTEGERS, SHORTS = vector(F32, LANES), vector(I32, LANES), vector(I16, 2 * LANES)
PANEL_BLOCK = PAIRS * LANES * 4  # bytes of a block in the panel
SIDE_BLOCK = 2 * LANES * 4  # and beside it: each row's scale, and what is to be taken off


def build_wide_products(module: Any) -> None:
    """Add `nf4`, `int4` and `int8` to the module, each plain, `.normed` and `.gated`."""
    multiply = {count: _multiply(module, count) for count in SIZES}
    for form in FORMS:
        few, many = _few(module, form), _many(module, form, multiply)
        for suffix, before in BEFORE.items():
            scale = prepare(
                module, f"{form.name}.prepare{suffix}", before,
                lambda k, m, c, values, form=form: _scaled(k, m, c, values, form),
            )  # fmt: skip
            k = Kernel(module, form.name + suffix, ProductWords)
            with k.if_else(k.icmp_signed(">=", k.word("x_rows"), I64(MANY))) as (if_many, if_few):
                with if_many:
                    k.in_parallel(scale)
                    k.in_parallel(many)
                with if_few:
                    k.call(scale, [k.arguments])
                    k.in_parallel(few)
            k.done()


def _scaled(k: Kernel, m: Any, c: Any, values: Any, form: Form) -> None:
    """Write 64 activations of row m as 16-bit numbers, their scale, and minus the sum of x₀x₁.

    Rows of x that are multiplied together stand together: a pair of the first, of the second and so on.
    """
    columns, count = k.words("columns", "x_rows")
    first = k.and_(m, I64(-AT_ONCE))
    group = k.least(k.sub(count, first), I64(AT_ONCE))
    block = k.udiv(c, I64(BLOCK))

    step = _step(k, values, form.largest)
    factor = k.select(k.fcmp_ordered(">", step, F32(as_float32(1e-34))), k.fdiv(F32(1.0), step), F32(0.0))
    rounded = k.intrinsic("llvm.rint.v64f32", vector(F32, BLOCK), k.fmul(values, k.splat(factor, BLOCK)))
    whole = k.fptosi(rounded, vector(I32, BLOCK))
    small = k.trunc(k.pick(whole, whole, form.order), vector(I16, BLOCK))

    pairs = k.bitcast(small, vector(I32, PAIRS))
    at = k.add(k.word("scratch"), k.mul(first, k.mul(columns, I64(2))))
    index = k.add(k.mul(k.mul(block, I64(PAIRS)), group), k.sub(m, first))
    with k.if_else(k.icmp_signed("==", group, I64(1))) as (if_alone, if_among):
        with if_alone:
            k.put(pairs, at, index)
        with if_among:
            for pair in range(PAIRS):
                k.put(k.extract_element(pairs, I32(pair)), at, k.add(index, k.mul(group, I64(pair))))

    halves = [[form.order[i] for i in range(BLOCK) if i // 2 % 2 == odd] for odd in (0, 1)]
    crossed = k.mul(*(k.pick(whole, whole, half) for half in halves))
    off = k.sub(I32(0), k.intrinsic(f"llvm.vector.reduce.add.v{PAIRS}i32", I32, crossed))
    at = k.add(k.word("scratch_scales"), k.mul(first, k.udiv(k.mul(columns, I64(8)), I64(BLOCK))))
    index = k.add(k.mul(k.mul(block, I64(2)), group), k.sub(m, first))
    k.put(step, at, index)
    k.put(off, at, k.add(index, group))


def _step(k: Kernel, values: Any, largest: int) -> Any:
    """Return the unit of 64 activations: no smaller than lets a number, and a sum of products, fit."""
    found = k.magnitude(values)
    single = k.fmul(k.largest(found), F32(as_float32(1.0 / (2**15 - 1 - largest))))
    # Rounding adds at most half a unit to each number.
    summed = k.fmul(k.sum(found), F32(as_float32(1.0 / ((2**31 - 1) // largest - BLOCK))))
    return k.largest(k.beside([single, summed]))


def _add_products(k: Kernel, total: Any, a: Any, b: Any) -> Any:
    """Add two products of 16-bit numbers to each lane."""
    a, b = k.bitcast(a, INTEGERS), k.bitcast(b, INTEGERS)
    return k.intrinsic("llvm.x86.avx512.vpdpwssd.512", INTEGERS, total, a, b)


def _add_block(k: Kernel, total: Any, found: Any, scales: Any, step: Any) -> Any:
    """Add a block's integers, scaled, to the sums of sixteen rows; every path rounds here, and in this way."""
    return k.fma(k.fmul(k.sitofp(found, FLOATS), scales), k.splat(step, LANES), total)


def _few(module: Any, form: Form) -> Any:
    """Let each thread multiply its rows of W with all rows of x, unpacking them for each group of these."""
    products = {count: _direct(module, form, count) for count in SIZES}
    k = Kernel(module, f"{form.name}.few", ProductWords)
    start, stop = k.share(k.word("rows"), LANES)

    def rows(first: Any) -> None:
        _in_groups(k, lambda m, size: k.call(products[size], [k.arguments, first, m]))

    k.loop(start, stop, LANES, rows)
    return k.done()


def _in_groups(k: Kernel, body: Any) -> None:
    """Call `body(m, size)` for all rows of x, as many at once as can be."""
    count = k.word("x_rows")
    whole = k.and_(count, I64(-AT_ONCE))

    def all_at_once(m: Any) -> None:
        body(m, AT_ONCE)

    k.loop(I64(0), whole, AT_ONCE, all_at_once)
    for size in range(1, AT_ONCE):
        with k.if_then(k.icmp_signed("==", k.sub(count, whole), I64(size))):
            body(whole, size)


def _direct(module: Any, form: Form, count: int) -> Any:
    """Multiply sixteen rows of W from `first` on with `count` rows of x from m on."""
    k = Kernel(module, f"{form.name}.direct{count}", ProductWords, extra=2)
    first, m = k.extra
    rows = Rows(k, form, first)
    x, steps = _x_from(k, m, I64(0), count)

    add = _add_pairs if count < CROSSED else _add_crossed
    words = k.space(form.words * LANES * 4)  # unpacked in a loop, or there would be too much code to compile

    def block(b: Any, *totals: Any) -> list[Any]:
        rows.ask_for_next_rows(b)
        for index, word in enumerate(rows.words(b)):
            k.put(word, words, I64(LANES * index))
        x_here, steps_here = k.add(x, k.mul(b, I64(4 * PAIRS * count))), k.add(steps, k.mul(b, I64(8 * count)))
        scales, zero_points = rows.beside(b)

        def word_by_word(index: Any, *found: Any) -> list[Any]:
            pairs = form.unpack(k, k.get(words, k.mul(index, I64(LANES)), INTEGERS), zero_points)
            x_now = k.add(x_here, k.mul(index, I64(4 * count * len(pairs))))
            return add(k, count, list(found), pairs, x_now)

        offs = [k.get(steps_here, I64(count + j), I32) for j in range(count)]
        zeros = [constants(I32, [0] * LANES)] * (count * -(-SUMS_AT_ONCE // count))
        if count < CROSSED:
            found = k.loop(I64(0), I64(form.words), 1, word_by_word, *zeros)
        else:
            begin = [k.splat(off, LANES) for off in offs]
            *found, crossed = k.loop(I64(0), I64(form.words), 1, word_by_word, *begin, zeros[0])
            found = [k.sub(one, crossed) for one in found]
        following = []
        for j in range(count):
            whole = reduce(k.add, found[j::count])
            following.append(_add_block(k, totals[j], whole, scales, k.get(steps_here, I64(j), F32)))
        return following

    blocks = k.udiv(k.word("columns"), I64(BLOCK))
    totals = k.loop(I64(0), blocks, 1, block, *[constants(F32, [0.0] * LANES)] * count)
    for j in range(count):
        _put_results(k, form, totals[j], k.add(m, I64(j)), first)
    return k.done()


def _add_pairs(k: Kernel, count: int, found: list[Any], pairs: list[Any], x: Any) -> list[Any]:
    """Add the products of pairs of W with those of `count` rows of x, which stand at `x`."""
    for number, pair in enumerate(pairs):
        for j in range(count):
            one = k.splat(k.get(x, I64(count * number + j), I32), LANES)
            place = (count * number + j) % len(found)
            found[place] = _add_products(k, found[place], pair, one)
    return found


def _add_crossed(k: Kernel, count: int, found: list[Any], pairs: list[Any], x: Any) -> list[Any]:
    """The same by Winograd's way; the last of `found` is what is to be taken off for W."""
    *sums, crossed = found
    for number in range(0, len(pairs), 2):
        w0, w1 = (k.bitcast(pair, SHORTS) for pair in pairs[number : number + 2])
        crossed = _add_products(k, crossed, w0, w1)
        for j in range(count):
            x0, x1 = (k.bitcast(k.splat(k.get(x, I64(count * (number + i) + j), I32), LANES), SHORTS) for i in (0, 1))
            sums[j] = _add_products(k, sums[j], k.add(x0, w1), k.add(x1, w0))
    return [*sums, crossed]


def _x_from(k: Kernel, m: Any, b: Any, group: int) -> tuple[Any, Any]:
    """Return where the numbers and the scales of a group of rows of x from m on are, from block b on."""
    columns = k.word("columns")
    place = k.add(k.mul(m, columns), k.mul(b, I64(BLOCK * group)))
    x = k.add(k.word("scratch"), k.mul(place, I64(2)))
    return x, k.add(k.word("scratch_scales"), k.udiv(k.mul(place, I64(8)), I64(BLOCK)))


def _many(module: Any, form: Form, multiply: dict[int, Any]) -> Any:
    """Let each thread walk its rows of W in tiles, each tile in panels, and multiply each panel with all rows of x."""
    fill = _fill(module, form)
    k = Kernel(module, f"{form.name}.many", ProductWords)
    n, count = k.words("rows", "x_rows")
    blocks = k.udiv(k.word("columns"), I64(BLOCK))
    start, stop = k.share(n, LANES)
    thread = k.sext(k.intrinsic("omp_get_thread_num", I32), I64)
    sums = k.add(k.word("sums"), k.mul(thread, k.mul(count, I64(4 * SUMS))))
    panel = k.space(CHUNK * (PANEL_BLOCK + SIDE_BLOCK))
    side = k.add(panel, I64(CHUNK * PANEL_BLOCK))

    def tile(first: Any) -> None:
        last = k.least(k.add(first, I64(SUMS)), stop)
        zeros = constants(F32, [0.0] * LANES)
        strips = k.udiv(k.add(k.sub(last, first), I64(LANES - 1)), I64(LANES))
        k.loop(I64(0), k.mul(strips, count), 1, lambda i: k.put(zeros, sums, k.mul(i, I64(LANES))))

        def sums_of(r: Any, m: Any) -> Any:
            strip = k.udiv(k.sub(r, first), I64(LANES))
            return k.add(sums, k.mul(k.add(k.mul(strip, count), m), I64(4 * LANES)))

        def chunk(b: Any) -> None:
            here = k.least(k.sub(blocks, b), I64(CHUNK))

            def strip(r: Any) -> None:
                def group(m: Any, size: int) -> None:
                    x, steps = _x_from(k, m, b, size)
                    k.call(multiply[size], [k.arguments, panel, side, x, steps, sums_of(r, m), here])

                k.call(fill, [k.arguments, r, b, here, panel, side])
                _in_groups(k, group)

            k.loop(first, last, LANES, strip)

        def results(r: Any) -> None:
            k.loop(I64(0), count, 1, lambda m: _put_results(k, form, k.get(sums_of(r, m), I64(0), FLOATS), m, r))

        k.loop(I64(0), blocks, CHUNK, chunk)
        k.loop(first, last, LANES, results)

    k.loop(start, stop, SUMS, tile)
    return k.done()


def _fill(module: Any, form: Form) -> Any:
    """Unpack `count` blocks of sixteen rows of W into a panel; beside it, scales and minus the sums of w₀w₁."""
    k = Kernel(module, f"{form.name}.fill", ProductWords, extra=5)
    first, start, count, panel, side = k.extra
    rows = Rows(k, form, first)

    def one(b: Any) -> None:
        rows.ask_ahead(k.add(start, b), CHUNK, SUMS)
        block = k.add(start, b)
        scales, zero_points = rows.beside(block)
        pairs = [k.bitcast(pair, INTEGERS) for word in rows.words(block) for pair in form.unpack(k, word, zero_points)]
        at = k.add(panel, k.mul(b, I64(PANEL_BLOCK)))
        for index, pair in enumerate(pairs):
            k.put(pair, at, I64(LANES * index))
        crossed = constants(I32, [0] * LANES)
        for index in range(0, PAIRS, 2):
            crossed = _add_products(k, crossed, pairs[index], pairs[index + 1])
        at = k.add(side, k.mul(b, I64(SIDE_BLOCK)))
        k.put(scales, at, I64(0))
        k.put(k.sub(constants(I32, [0] * LANES), crossed), at, I64(LANES))

    k.loop(I64(0), count, 1, one)
    return k.done()


def _multiply(module: Any, count: int) -> Any:
    """Add the products of a panel with `count` rows of x to their sums."""
    k = Kernel(module, f"panel.rows{count}", ProductWords, extra=6)
    panel, side, x, steps, sums, blocks = k.extra

    def block(b: Any, *totals: Any) -> list[Any]:
        here = k.add(panel, k.mul(b, I64(PANEL_BLOCK)))
        beside = k.add(side, k.mul(b, I64(SIDE_BLOCK)))
        x_here = k.add(x, k.mul(b, I64(4 * PAIRS * count)))
        steps_here = k.add(steps, k.mul(b, I64(8 * count)))

        def two_pairs(pair: Any, *found: Any) -> list[Any]:
            w_now = k.add(here, k.mul(pair, I64(4 * LANES)))
            x_now = k.add(x_here, k.mul(pair, I64(4 * count)))
            w0, w1 = (k.get(w_now, I64(2 * LANES * i), SHORTS) for i in (0, 1))
            following = []
            for j in range(count):
                x0, x1 = (k.bitcast(k.splat(k.get(x_now, I64(count * i + j), I32), LANES), SHORTS) for i in (0, 1))
                following.append(_add_products(k, found[j], k.add(x0, w1), k.add(x1, w0)))
            return following

        off = k.get(beside, I64(LANES), INTEGERS)
        offs = [k.add(off, k.splat(k.get(steps_here, I64(count + j), I32), LANES)) for j in range(count)]
        found = k.loop(I64(0), I64(PAIRS), 2, two_pairs, *offs)
        scales = k.get(beside, I64(0), FLOATS)
        return [_add_block(k, totals[j], found[j], scales, k.get(steps_here, I64(j), F32)) for j in range(count)]

    totals = k.loop(I64(0), blocks, 1, block, *[k.get(sums, I64(LANES * j), FLOATS) for j in range(count)])
    for j in range(count):
        k.put(totals[j], sums, I64(LANES * j))
    return k.done()


def _put_results(k: Kernel, form: Form, value: Any, m: Any, r: Any) -> None:
    """Write sixteen numbers of row m of y from r on, as far as there are, with their bias and residual."""
    n = k.word("rows")
    left = k.splat(k.trunc(k.sub(n, r), I32), LANES)
    is_there = k.icmp_signed("<", constants(I32, range(LANES)), left)
    whole = k.float_word("whole")
    if form.bits == 4:
        factor = k.splat(k.fmul(whole, F32(as_float32(1.0 / form.unit))), LANES)
    else:
        factor = k.fmul(k.get_where(is_there, k.word("scales"), r, FLOATS), k.splat(whole, LANES))
    place = k.add(k.mul(m, n), r)
    y, bias, residual = k.words("y", "bias", "residual")
    k.put_where(is_there, k.fmul(value, factor), y, place)
    for address, index in ((bias, r), (residual, place)):
        with k.if_then(k.icmp_signed("!=", address, I64(0))):
            more = k.get_where(is_there, address, index, FLOATS)
            k.put_where(is_there, k.fadd(k.get_where(is_there, y, place, FLOATS), more), y, place)
