"""A step of decoding as a list of kernel calls, made once and then run with one call from Python.

Between products that take a tenth of a millisecond each, what Python does to start them would be a fifth of the time.
Where our kernels do not attend, as on a GPU, `static.py` takes such steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from loadstone.quantization.kernels.cpu import AttentionKernel, Call, Tokens, Work, cpu_kernels, room_for_scores

from .batch import FEW_TOKENS, Segment, wanted_rows
from .cache import KVCache
from .static import StaticStep, StaticSteps

if TYPE_CHECKING:
    from .decoder import Decoder

SMALLEST = 4  # rows of the first buffers


class Buffers:
    """What lies between the products of a layer, for at most `count` tokens; every layer uses the same."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        first = decoder.layers[0]
        query_key_value, output, gate_up, _ = (product.weight for product in first.products)
        self.count = count
        self.threads = torch.get_num_threads()
        self.states, self.between = torch.empty(2, count, output.rows)
        self.query_key_value = torch.empty(count, query_key_value.rows)
        self.seen = torch.empty(count, output.columns)
        self.gate_up = torch.empty(count, gate_up.rows)
        self.scores = room_for_scores(len(decoder.cosines))
        self.work = Work(count, max(product.weight.columns for product in first.products))


class Step:
    """What all layers do to `count` tokens, in our kernels."""

    def __init__(
        self, decoder: Decoder, attention: AttentionKernel, cache: KVCache, buffers: Buffers, count: int
    ) -> None:
        kernels = cpu_kernels()
        assert kernels is not None  # or there were no attention
        self.tokens = Tokens(range(count), buffers.scores)
        self.states: torch.Tensor = buffers.states[:count]
        self._run = kernels.replay([*self._calls(decoder, attention, cache, buffers)])

    def _calls(self, decoder: Decoder, attention: AttentionKernel, cache: KVCache, buffers: Buffers) -> Iterator[Call]:
        count, epsilon, work = len(self.tokens), decoder.norm_epsilon, buffers.work
        states, between = self.states, buffers.between[:count]
        qkv, seen, gate_up = buffers.query_key_value[:count], buffers.seen[:count], buffers.gate_up[:count]
        for index, layer in enumerate(decoder.layers):
            yield layer.query_key_value.call(states, qkv, work, norm=layer.attention_norm, epsilon=epsilon)
            yield attention.call(
                qkv, seen, self.tokens, cache.keys[index], cache.values[index], decoder.heads, decoder.cosines,
                decoder.sines, window=layer.window, query_norm=layer.query_norm, key_norm=layer.key_norm,
                epsilon=epsilon,
            )  # fmt: skip
            yield layer.output.call(seen, between, work, residual=states)
            yield layer.gate_up.call(between, gate_up, work, norm=layer.mlp_norm, epsilon=epsilon)
            yield layer.down.call(gate_up, states, work, gated=True, residual=between)

    def __call__(self, decoder: Decoder, ids: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
        """Return the states of the rows that are wanted after the layers; they may be overwritten by the next step."""
        tables = [one.block_table for one in segments for _ in range(one.length)]
        self.tokens.place(tables, [one.start + j for one in segments for j in range(one.length)])
        self.states.copy_(decoder.embedding.lookup(torch.tensor(ids)))
        self._run()
        wanted = wanted_rows(segments)
        return self.states if len(wanted) == len(ids) else self.states[wanted]


class Steps:
    """The steps of one decoder on one cache by their number of tokens, made when first needed.

    They hold the memory of both, so they are not to outlive either.
    """

    def __init__(self) -> None:
        self._buffers: Buffers | None = None
        self._made: dict[int, Step | None] = {}
        self._static = StaticSteps()

    def of(self, decoder: Decoder, cache: KVCache, segments: Sequence[Segment], count: int) -> Step | StaticStep | None:
        """Return the step for these segments of `count` tokens in all.

        It is None for more than a few tokens of a sequence, or of all together, and where kernels do a part of it only.
        """
        if any(one.length > FEW_TOKENS for one in segments):
            return None
        if decoder.attention is None:
            return self._static.of(decoder, cache, segments, count)
        if self._buffers is not None and self._buffers.threads != torch.get_num_threads():
            self._buffers, self._made = None, {}
        if count not in self._made:
            self._made[count] = self._make(decoder, decoder.attention, cache, count)
        return self._made[count]

    def _make(self, decoder: Decoder, attention: AttentionKernel, cache: KVCache, count: int) -> Step | None:
        if not all(product.takes(count) for layer in decoder.layers for product in layer.products):
            return None
        if self._buffers is None or self._buffers.count < count:
            self._buffers = Buffers(decoder, max(SMALLEST, 1 << (count - 1).bit_length()))
            self._made = {}  # those made before hold the smaller ones
        return Step(decoder, attention, cache, self._buffers, count)
