"""Sixteen rows of W, a row a lane: 4- and 8-bit weights unpacked to pairs of 16-bit numbers for 512-bit products.

A vector holds one 32-bit word of sixteen rows, as they stand in memory. A word's numbers become pairs of 16 bits by
shifts and, for NF4, one look-up of 32 codes (VPERMW), for int4 one difference. The activations of a block are put in
the order in which the pairs then stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadstone.quantization.codes import BLOCK, LANES, NF4, ZERO_STEPS

from ._llvm import F16, F32, I16, I32, I64, Kernel, constants, vector

PAIRS = BLOCK // 2
LINE = 64  # bytes of a cache's line
# NF4's largest number. Of all scales, this one makes the sum of two errors smallest: that of rounding NF4's values
# times the scale (they happen to lie near whole numbers), and that of activations, which have the fewer bits the larger
# this is: the sum over a block is to fit 32 bits.
NF4_SCALE = 6282.75


@dataclass(frozen=True)
class Form:
    """How a kind of weights is unpacked: `unpack` makes pairs of a vector of 32-bit words, and of zero points."""

    name: str
    bits: int  # a weight
    largest: int  # magnitude of a number after unpacking
    order: Sequence[int]  # the columns of a block, in the order of the pairs
    unpack: Callable[[Kernel, Any, Any], list[Any]]
    side: int  # bytes beside a block of a row: nothing, its scale, or its group's scale and zero point
    unit: float  # how many of its numbers are 1

    @property
    def words(self) -> int:
        """32-bit words that 64 weights of a row take."""
        return BLOCK * self.bits // 32


class Rows:
    """Sixteen rows of W from `first` on, a multiple of sixteen, which stand turned in memory (`turned.py`)."""

    def __init__(self, k: Kernel, form: Form, first: Any) -> None:
        self.k, self.form = k, form
        self.blocks = k.udiv(k.word("columns"), I64(BLOCK))
        block = k.mul(k.udiv(first, I64(LANES)), self.blocks)
        self._read = [k.add(k.word("weights"), k.mul(block, I64(self._block_bytes)))]
        if form.side:
            self._read.append(k.add(k.word("scales"), k.mul(self._group(block), I64(LANES * form.side))))

    @property
    def _block_bytes(self) -> int:
        return LANES * self.form.words * 4

    def _group(self, block: Any) -> Any:
        """Return which group of those that have scales a block is in."""
        return self.k.udiv(block, self.k.word("group")) if self.form.side == 4 else block

    def words(self, b: Any) -> list[Any]:
        """Return block b's words: each vector has one word of sixteen rows."""
        k = self.k
        here = k.add(self._read[0], k.mul(b, I64(self._block_bytes)))
        return [k.get(here, I64(LANES * word), vector(I32, LANES)) for word in range(self.form.words)]

    def beside(self, b: Any) -> tuple[Any, Any]:
        """Return block b's scales (float32) of sixteen rows, and for int4 their zero points, each as a pair."""
        k = self.k
        if not self.form.side:  # a row has one scale, for all of it
            return constants(F32, [1.0] * LANES), None
        at = k.mul(self._group(b), I64(LANES))
        if self.form.side == 2:
            return k.fpext(k.get(self._read[1], at, vector(F16, LANES)), vector(F32, LANES)), None
        both = k.get(self._read[1], k.mul(at, I64(2)), vector(F16, 2 * LANES))
        scales, zeros = (k.pick(both, both, range(place, 2 * LANES, 2)) for place in (0, 1))
        return k.fpext(scales, vector(F32, LANES)), _pairs_of(k, zeros)

    def ask_for_next_rows(self, b: Any) -> None:
        """Ask memory for block b of the sixteen rows after these."""
        self._ask(self.k.add(self.blocks, b))

    def ask_ahead(self, b: Any, ahead: int, tile: int) -> None:
        """Ask memory for the block that is `ahead` after b in these rows, or where they end, `tile` rows further."""
        k = self.k
        place = k.add(b, I64(ahead))
        further = k.add(place, k.mul(self.blocks, I64(tile // LANES - 1)))
        self._ask(k.select(k.icmp_signed("<", place, self.blocks), place, further))

    def _ask(self, block: Any) -> None:
        k = self.k
        asked = [(block, self._block_bytes), (self._group(block), LANES * self.form.side)]
        for base, (index, size) in zip(self._read, asked, strict=False):
            place = k.add(base, k.mul(index, I64(size)))
            for line in range(0, size, LINE):
                k.prefetch(k.add(place, I64(line)))


def _pairs_of(k: Kernel, zeros: Any) -> Any:
    """Return zero points (float16) as 16-bit integers of so many steps, each twice: a pair in its lane."""
    steps = k.fmul(k.fpext(zeros, vector(F32, LANES)), constants(F32, [float(ZERO_STEPS)] * LANES))
    whole = k.fptosi(steps, vector(I32, LANES))
    both = k.or_(whole, k.shl(whole, constants(I32, [16] * LANES)))
    return k.bitcast(both, vector(I16, 2 * LANES))


def _nf4(k: Kernel, word: Any, zeros: Any) -> list[Any]:
    # A look-up heeds five bits of each 16; the fifth is of another code, so the table stands there twice.
    table = constants(I16, [round(value * NF4_SCALE) for value in NF4] * 2)
    pairs = []
    for shift in range(0, 16, 4):
        codes = k.bitcast(k.lshr(word, constants(I32, [shift] * LANES)), vector(I16, 2 * LANES))
        pairs.append(k.intrinsic("llvm.x86.avx512.permvar.hi.512", codes.type, table, codes))
    return pairs


def _int4(k: Kernel, word: Any, zeros: Any) -> list[Any]:
    # Codes stand four bits up, so that they are steps of zero points too, at no cost: there are shifts anyway.
    mask = constants(I16, [15 * ZERO_STEPS] * 2 * LANES)
    pairs = []
    for shift in (-4, 0, 4, 8):
        by = constants(I32, [abs(shift)] * LANES)
        codes = k.bitcast(k.shl(word, by) if shift < 0 else k.lshr(word, by), vector(I16, 2 * LANES))
        pairs.append(k.sub(k.and_(codes, mask), zeros))
    return pairs


def _int8(k: Kernel, word: Any, zeros: Any) -> list[Any]:
    eight = constants(I16, [8] * 2 * LANES)
    numbers = k.bitcast(word, vector(I16, 2 * LANES))
    return [k.ashr(k.shl(numbers, eight), eight), k.ashr(numbers, eight)]


# Nibble n of a word is column n ^ 1: the first of two codes is in the high nibble.
_NIBBLES = [8 * word + (nibble ^ 1) for word in range(8) for low in range(4) for nibble in (low, low + 4)]
_INT8_ORDER = [4 * word + byte for word in range(16) for low in (0, 1) for byte in (low, low + 2)]
FORMS = (
    Form("nf4", 4, round(NF4_SCALE), _NIBBLES, _nf4, side=2, unit=NF4_SCALE),
    Form("int4", 4, 16 * ZERO_STEPS, _NIBBLES, _int4, side=4, unit=ZERO_STEPS),
    Form("int8", 8, 128, _INT8_ORDER, _int8, side=0, unit=1.0),
)
