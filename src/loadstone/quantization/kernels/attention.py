"""Attention of single new tokens: rotate, put in the cache, look back; for all tokens and heads at once.

A step of decoding needs these few small things in every layer, where torch would spend more time starting
operations than doing them. Compiled for one head size, which makes all inner loops straight code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._llvm import F16, F32, I16, I32, I64, Kernel, as_float32, constants, vector
from .products import load_floats
from .words import KV_BLOCK, AttentionWords

LANES = 8
SHIFT = KV_BLOCK.bit_length() - 1
AT_ONCE = 4  # places looked at together, so that sums do not wait for one another

Line = Callable[[Any], Any]


def build_attention(module: Any, size: int, cache: str) -> None:
    """Add `attend` for heads of `size` numbers (a multiple of 16) and a cache of type `cache` to the module."""
    remember = _remember(module, size, cache)
    look_back = _look_back(module, size, cache)
    k = Kernel(module, "attend", AttentionWords)
    k.call(remember, [k.arguments])
    k.in_parallel(look_back)
    k.done()


def _remember(module: Any, size: int, cache: str) -> Any:
    """Norm and rotate queries and keys where they are, and write keys and values into the cache."""
    k = Kernel(module, "remember", AttentionWords)
    qkv, rows, tables, positions = k.words("qkv", "rows", "tables", "positions")
    count, keys, values, places = k.words("tokens", "keys", "values", "places")
    heads, groups = k.words("heads", "groups")
    width = k.mul(k.add(heads, k.mul(groups, I64(2))), I64(size))

    def token(i: Any) -> None:
        row = k.mul(k.get(rows, i, I64), width)
        position = k.get(positions, i, I64)
        place = _place(k, k.get(tables, i, I64), position)
        at = k.add(qkv, k.mul(row, I64(4)))

        def head(h: Any) -> None:
            here = k.add(at, k.mul(h, I64(4 * size)))
            is_key = k.icmp_signed(">=", h, heads)
            norm = k.select(is_key, k.word("key_norm"), k.word("query_norm"))
            with k.if_then(k.icmp_signed("!=", norm, I64(0))):
                _norm(k, here, norm, size)
            _rotate(k, here, position, size)
            with k.if_then(is_key):
                line = k.add(k.mul(k.sub(h, heads), places), place)
                _copy(k, here, keys, k.mul(line, I64(size)), size, cache)

        k.loop(I64(0), k.add(heads, groups), 1, head)

        def value(g: Any) -> None:
            here = k.add(at, k.mul(k.add(k.add(heads, groups), g), I64(4 * size)))
            _copy(k, here, values, k.mul(k.add(k.mul(g, places), place), I64(size)), size, cache)

        k.loop(I64(0), groups, 1, value)

    k.loop(I64(0), count, 1, token)
    return k.done()


def _norm(k: Kernel, here: Any, weights: Any, size: int) -> None:
    total = constants(F32, [0.0] * LANES)
    for part in range(0, size, LANES):
        values = k.get(here, I64(part), vector(F32, LANES))
        total = k.fma(values, values, total)
    mean = k.fmul(k.sum(total), F32(as_float32(1.0 / size)))
    root = k.intrinsic("llvm.sqrt.f32", F32, k.fadd(mean, k.float_word("epsilon")))
    factor = k.splat(k.fdiv(F32(1.0), root), LANES)
    for part in range(0, size, LANES):
        values = k.fmul(k.get(here, I64(part), vector(F32, LANES)), factor)
        k.put(k.fmul(values, k.get(weights, I64(part), vector(F32, LANES))), here, I64(part))


def _rotate(k: Kernel, here: Any, position: Any, size: int) -> None:
    half = size // 2
    tables = [k.add(table, k.mul(position, I64(4 * half))) for table in k.words("cosines", "sines")]
    for part in range(0, half, LANES):
        cosine, sine = (k.get(table, I64(part), vector(F32, LANES)) for table in tables)
        first, second = (k.get(here, I64(part + offset), vector(F32, LANES)) for offset in (0, half))
        k.put(k.fsub(k.fmul(first, cosine), k.fmul(second, sine)), here, I64(part))
        k.put(k.fadd(k.fmul(second, cosine), k.fmul(first, sine)), here, I64(part + half))


def _copy(k: Kernel, source: Any, target: Any, index: Any, size: int, cache: str) -> None:
    for part in range(0, size, LANES):
        values = k.get(source, I64(part), vector(F32, LANES))
        if cache == "float16":
            values = k.fptrunc(values, vector(F16, LANES))
        elif cache == "bfloat16":
            bits = k.bitcast(values, vector(I32, LANES))
            even = k.and_(k.lshr(bits, constants(I32, [16] * LANES)), constants(I32, [1] * LANES))
            rounded = k.add(bits, k.add(even, constants(I32, [0x7FFF] * LANES)))
            values = k.trunc(k.lshr(rounded, constants(I32, [16] * LANES)), vector(I16, LANES))
        k.put(values, target, k.add(index, I64(part)))


def _look_back(module: Any, size: int, cache: str) -> Any:
    """For each of this thread's (token, head) pairs: scores, softmax, and the weighted sum of values."""
    k = Kernel(module, "look_back", AttentionWords)
    qkv, out, rows, tables, positions = k.words("qkv", "out", "rows", "tables", "positions")
    count, keys, values, places = k.words("tokens", "keys", "values", "places")
    heads, groups, window = k.words("heads", "groups", "window")
    width = k.mul(k.add(heads, k.mul(groups, I64(2))), I64(size))
    start, stop = k.share(k.mul(count, heads))
    thread = k.sext(k.intrinsic("omp_get_thread_num", I32), I64)
    scores = k.add(k.word("scores"), k.mul(k.mul(thread, k.word("room")), I64(4)))
    per_group = k.udiv(heads, groups)

    def pair(index: Any) -> None:
        token, head = k.udiv(index, heads), k.urem(index, heads)
        row, position = k.get(rows, token, I64), k.get(positions, token, I64)
        length = k.add(position, I64(1))
        outside = k.sub(length, window)
        is_cut = k.and_(k.icmp_signed(">", window, I64(0)), k.icmp_signed(">", outside, I64(0)))
        first = k.select(is_cut, outside, I64(0))
        seen = k.sub(length, first)
        table, group = k.get(tables, token, I64), k.mul(k.udiv(head, per_group), places)

        def line(t: Any) -> Any:
            """Where the t-th token that is seen is in the cache, in numbers."""
            return k.mul(k.add(group, _place(k, table, k.add(first, t))), I64(size))

        query = k.add(qkv, k.mul(k.add(k.mul(row, width), k.mul(head, I64(size))), I64(4)))
        most = _score(k, query, keys, line, seen, scores, size, cache)
        total = _soften(k, scores, seen, most)
        target = k.add(out, k.mul(k.add(k.mul(k.mul(row, heads), I64(size)), k.mul(head, I64(size))), I64(4)))
        _gather(k, scores, seen, total, values, line, target, size, cache)

    k.loop(start, stop, 1, pair)
    return k.done()


def _place(k: Kernel, table: Any, position: Any) -> Any:
    """Return the place in the cache of a sequence's token: its blocks may be anywhere."""
    block = k.get(table, k.lshr(position, I64(SHIFT)), I64)
    return k.add(k.shl(block, I64(SHIFT)), k.and_(position, I64(KV_BLOCK - 1)))


def _score(k: Kernel, query: Any, keys: Any, line: Line, seen: Any, scores: Any, size: int, cache: str) -> Any:
    """Write the scores of the `seen` tokens, and return the largest."""
    scale = F32(as_float32(size**-0.5))

    def look(count: int) -> Any:
        def places(t: Any, most: Any) -> list[Any]:
            sums = [constants(F32, [0.0] * LANES)] * count
            lines = [line(k.add(t, I64(j))) for j in range(count)]
            for part in range(0, size, LANES):
                wanted = k.get(query, I64(part), vector(F32, LANES))
                for j in range(count):
                    index = k.add(lines[j], I64(part))
                    sums[j] = k.fma(load_floats(k, cache, keys, index, LANES), wanted, sums[j])
            for j in range(count):
                score = k.fmul(k.sum(sums[j]), scale)
                k.put(score, scores, k.add(t, I64(j)))
                most = k.select(k.fcmp_unordered(">", score, most), score, most)
            return [most]

        return places

    whole = k.and_(seen, I64(-AT_ONCE))
    most = k.loop(I64(0), whole, AT_ONCE, look(AT_ONCE), F32(as_float32(-1e30)))[0]
    return k.loop(whole, seen, 1, look(1), most)[0]


def _soften(k: Kernel, scores: Any, seen: Any, most: Any) -> Any:
    """Replace scores by e to their distance from the largest, and return the sum of those."""
    far = constants(F32, [as_float32(-1e30)] * LANES)
    k.put(far, scores, seen)  # what the last vector holds beyond the end adds nothing

    def part(t: Any, total: Any) -> list[Any]:
        distance = k.fsub(k.get(scores, t, vector(F32, LANES)), k.splat(most, LANES))
        weights = k.exponential(distance)
        near = k.fcmp_unordered(">", distance, constants(F32, [-87.0] * LANES))
        weights = k.select(near, weights, constants(F32, [0.0] * LANES))
        k.put(weights, scores, t)
        return [k.fadd(total, weights)]

    return k.sum(k.loop(I64(0), seen, LANES, part, constants(F32, [0.0] * LANES))[0])


def _gather(
    k: Kernel, scores: Any, seen: Any, total: Any, values: Any, line: Line, target: Any, size: int, cache: str
) -> None:
    """Write the sum of values, each weighted by its score, over the total."""
    factor = k.splat(k.fdiv(F32(1.0), total), LANES)
    for begin in range(0, size, 8 * LANES):
        parts = range(begin, min(size, begin + 8 * LANES), LANES)

        def place(t: Any, *sums: Any, parts: range = parts) -> list[Any]:
            weight = k.splat(k.get(scores, t, F32), LANES)
            index = line(t)
            found = [load_floats(k, cache, values, k.add(index, I64(part)), LANES) for part in parts]
            return [k.fma(one, weight, so_far) for one, so_far in zip(found, sums, strict=True)]

        sums = k.loop(I64(0), seen, 1, place, *[constants(F32, [0.0] * LANES)] * len(parts))
        for part, found in zip(parts, sums, strict=True):
            k.put(k.fmul(found, factor), target, I64(part))
