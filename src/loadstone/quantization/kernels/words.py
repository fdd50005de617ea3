"""What a call hands to a kernel: one array of 64-bit words, each an address, a number, or a float's bits.

The kernels read the words by these names, and `cpu.py` writes them by the same.
"""

from __future__ import annotations

from typing import NamedTuple

SUMS = 128  # rows of W of which a thread keeps sums of products with all rows of x


KV_BLOCK = 16  # tokens of a sequence that are side by side in the KV cache; a power of two


class ProductWords(NamedTuple):
    """y = f(x)·Wᵀ + bias + residual, for M = `x_rows` rows of x, K = `columns` and N = `rows` of W."""

    x: int  # float32, M × K; gated: M × 2K
    weights: int
    scales: int  # NF4: float16, N × K/64; int4: float16, N × groups × 2; int8: float32, N; floats: 0
    y: int  # float32, M × N
    rows: int
    columns: int
    x_rows: int
    scratch: int  # what W is multiplied with: int16 or float32, M × K
    scratch_scales: int  # beside an int16 scratch: M × K/64 × 2 words, each pair a float32 scale and what wide.py adds
    whole: int  # a float: the scale of all of W
    threads: int
    norm: int  # float32, K, or 0
    epsilon: int  # a float: the norm's
    bias: int  # float32, N, or 0
    residual: int  # float32, M × N, or 0
    sums: int  # scratch: float32, threads × SUMS × M; 0 where there is no need
    group: int  # int4: blocks of 64 columns that have a scale and a zero point; else 1


class QuantizerWords(NamedTuple):
    """A weight in, codes or numbers and their scales out."""

    weights: int
    numbers: int  # NF4, int4: uint8, two codes a byte, the first in the high nibble; int8: int8
    scales: int  # NF4, int4: float32, one for 64 weights; int8: float32, one a row
    rows: int
    columns: int
    threads: int
    zeros: int = 0  # int4: float32, one for 64 weights


class TurningWords(NamedTuple):
    """Rows of codes in, their words turned out."""

    plain: int  # 32-bit words, rows × words
    turned: int  # 32-bit words, … × words × 16
    first: int  # the row of `turned` that the first of `plain` is
    rows: int
    words: int  # a row


class AttentionWords(NamedTuple):
    """What some single new tokens see; each is a row of `qkv`, and belongs to a sequence in the cache."""

    qkv: int  # float32, … × (heads + 2·groups)·size; rotated in place
    out: int  # float32, … × heads·size
    rows: int  # int64, tokens: which rows of qkv and out the tokens are
    tables: int  # int64, tokens: the address of each token's table, which has its sequence's blocks, int64
    positions: int  # int64, tokens: each token's position in its sequence
    tokens: int
    keys: int  # groups × places × size, in the cache's type
    values: int
    places: int
    heads: int
    groups: int
    threads: int
    cosines: int  # float32, positions × size/2
    sines: int
    window: int  # in tokens, or 0
    scores: int  # scratch: float32, threads × room
    room: int
    query_norm: int  # float32, size, or 0
    key_norm: int
    epsilon: int  # a float: the norms'


class ReplayWords(NamedTuple):
    """Calls of other kernels, to be made in order."""

    calls: int  # int64, count × 2: a function's address, and that of its words
    number: int
