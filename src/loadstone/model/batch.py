"""The tokens of one forward pass: which sequences they belong to, and what they see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from loadstone.quantization.kernels.cpu import Tokens, room_for_scores
from loadstone.quantization.kernels.words import KV_BLOCK

from .attention import attend
from .layer import Layer
from .rope import rotate

if TYPE_CHECKING:
    from .decoder import Decoder

functional = torch.nn.functional

FEW_TOKENS = 16  # of a sequence: up to here looking back token by token is quicker than what torch prepares for a chunk


@dataclass(frozen=True, eq=False)
class Segment:
    """`length` new tokens of a sequence, the first at position `start`; logits are wanted after the last `wanted`.

    `block_table` names the blocks of the cache that the sequence holds, int64 and on the CPU: see `block_table_of`.
    """

    block_table: torch.Tensor
    start: int
    length: int
    wanted: int = 1


def ended(segments: Sequence[Segment]) -> Iterator[tuple[Segment, int]]:
    """Go through segments, each with the row after its last one."""
    return zip(segments, accumulate(one.length for one in segments), strict=True)


def wanted_rows(segments: Sequence[Segment]) -> list[int]:
    """Return the rows after which logits are wanted, in order."""
    return [row for one, end in ended(segments) for row in range(end - one.wanted, end)]


class Batch:
    """Where the tokens of one forward pass belong, and what they see.

    Few new tokens of a sequence go through the CPU's attention kernel, where there is one, all sequences together;
    chunks of a prompt go through torch, one sequence after the other.
    """

    def __init__(self, segments: Sequence[Segment], decoder: Decoder) -> None:
        self.decoder = decoder
        self.chunks: list[_Chunk] = []
        few: list[tuple[int, torch.Tensor, int]] = []
        for one, end in ended(segments):
            if decoder.attention is not None and one.length <= FEW_TOKENS:
                few += [(end - one.length + j, one.block_table, one.start + j) for j in range(one.length)]
            else:
                self.chunks.append(_Chunk(one, end, decoder))
        self.tokens = None
        if few:
            rows, tables, positions = zip(*few, strict=True)
            self.tokens = Tokens(rows, room_for_scores(max(positions) + 1))
            self.tokens.place(tables, positions)

    def attend(self, qkv: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add the tokens' keys and values to the cache, and return what they see: N × heads·head_size.

        `qkv` is N × (heads + 2·kv_heads)·head_size; `keys` and `values` are kv_heads × places × head_size.
        """
        decoder = self.decoder
        seen = qkv.new_empty(qkv.shape[0], decoder.heads * decoder.head_size)
        if self.tokens is not None and decoder.attention is not None:
            decoder.attention(
                qkv, seen, self.tokens, keys, values, decoder.heads, decoder.cosines, decoder.sines,
                window=layer.window, query_norm=layer.query_norm, key_norm=layer.key_norm,
                epsilon=decoder.norm_epsilon,
            )  # fmt: skip
        for chunk in self.chunks:
            seen[chunk.rows] = chunk.attend(qkv[chunk.rows], layer, keys, values)
        return seen


def turned(
    qkv: torch.Tensor, layer: Layer, decoder: Decoder, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the queries, keys and values of N tokens, N × heads × head_size each; the first two normed and rotated.

    `qkv` is N × (heads + 2·kv_heads)·head_size; `cosines` and `sines` are those of the tokens, N × 1 × head_size/2.
    """
    heads, groups = decoder.heads, decoder.kv_heads
    fused = qkv.view(-1, heads + 2 * groups, decoder.head_size)
    turning, values = torch.split(fused, [heads + groups, groups], 1)
    if layer.query_norm is not None and layer.key_norm is not None:
        shape, epsilon = (decoder.head_size,), decoder.norm_epsilon
        queries = functional.rms_norm(turning[:, :heads], shape, layer.query_norm, epsilon)
        keys = functional.rms_norm(turning[:, heads:], shape, layer.key_norm, epsilon)
        turning = torch.cat((queries, keys), 1)
    queries, keys = torch.split(rotate(turning, cosines, sines), [heads, groups], 1)
    return queries, keys, values


class _Chunk:
    """A segment that goes through torch, and where its sequence is in the cache."""

    def __init__(self, segment: Segment, end: int, decoder: Decoder) -> None:
        self.decoder = decoder
        self.rows = slice(end - segment.length, end)
        self.stop = segment.start + segment.length
        blocks = segment.block_table[: -(-self.stop // KV_BLOCK)]
        positions = torch.arange(segment.start, self.stop)
        places = blocks[positions // KV_BLOCK] * KV_BLOCK + positions % KV_BLOCK
        self.blocks, self.places = blocks.to(decoder.device), places.to(decoder.device)
        turned = slice(segment.start, self.stop)
        self.turn = (decoder.cosines[turned].unsqueeze(1), decoder.sines[turned].unsqueeze(1))

    def attend(self, qkv: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add the chunk's keys and values to the cache, and return what its tokens see."""
        queries, new_keys, new_values = turned(qkv, layer, self.decoder, *self.turn)
        keys.index_copy_(1, self.places, new_keys.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self.places, new_values.transpose(0, 1).to(values.dtype))
        seen = attend(queries, self._past(keys), self._past(values), layer.window)
        return seen.reshape(len(self.places), -1)

    def _past(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the sequence's keys or values up to the chunk's end, side by side: kv_heads × stop × head_size."""
        blocks = kept.view(kept.shape[0], -1, KV_BLOCK, kept.shape[2])
        return blocks.index_select(1, self.blocks).flatten(1, 2)[:, : self.stop].to(self.decoder.dtype)
