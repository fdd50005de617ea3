"""The arithmetic of a pre-norm transformer with rotary positions and a gated MLP, for every known architecture.

Tokens of several sequences are computed as one flat list: products see N rows, attention sees segments. Knows
tokens and their places in the KV cache; nothing of text, requests or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from loadstone.quantization.kernels.cpu import Tokens, cpu_kernels
from loadstone.quantization.linear import Linear
from loadstone.store import Attached, Entry

from .attention import attend
from .cache import KVCache
from .publishing import Publishing
from .rope import rotate

functional = torch.nn.functional


@dataclass(frozen=True)
class Segment:
    """`length` new tokens of a sequence that holds the cache's places from `base` on; the first is at `start`."""

    base: int
    start: int
    length: int


@dataclass
class Product:
    """A weight and its bias."""

    weight: Linear
    bias: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, *, norm: torch.Tensor | None = None, epsilon: float = 0.0, gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return f(x)·Wᵀ + bias + residual; see `Linear`."""
        return self.weight(x, norm=norm, epsilon=epsilon, gated=gated, bias=self.bias, residual=residual)


@dataclass
class Layer:
    """The weights of one layer; q, k and v are one product, and so are gate and up."""

    attention_norm: torch.Tensor
    query_key_value: Product
    output: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    window: int | None = None


@dataclass
class Decoder:
    """A model ready to multiply.

    `cosines` and `sines` are context × head_size/2 in the compute dtype.
    """

    embedding: Linear
    layers: list[Layer]
    norm: torch.Tensor
    head: Linear
    cosines: torch.Tensor
    sines: torch.Tensor
    heads: int
    kv_heads: int
    head_size: int
    norm_epsilon: float
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    attached: Attached | None = None  # the entry of the store that the weights are in, as long as they are used
    publishing: Publishing | None = None  # who writes them into the store, where they had to be made

    def __post_init__(self) -> None:
        kernels = cpu_kernels() if self.device.type == "cpu" and self.dtype == torch.float32 else None
        self.attention = kernels.attention(self.head_size, self.cache_dtype) if kernels is not None else None

    def new_cache(self, tokens: int) -> KVCache:
        """Return an empty KV cache for `tokens` tokens in all."""
        return KVCache(len(self.layers), self.kv_heads, tokens, self.head_size, self.device, self.cache_dtype)

    def release(self) -> None:
        """Let go of every weight, whoever still holds this object, once they are kept; it cannot be used after that."""
        attached = self.attached
        try:
            self.settle()
        finally:
            vars(self).clear()
        if attached is not None:
            attached.close()

    def settle(self) -> None:
        """Wait until the weights are in the store, or cannot be kept."""
        if self.publishing is not None:
            self.publishing.finish()

    @property
    def is_settled(self) -> bool:
        """Whether `settle` would not wait."""
        return self.publishing is None or self.publishing.is_over

    @property
    def entry(self) -> Entry | None:
        """The entry of the store that has the weights, or None where none has them, or not yet."""
        if self.attached is not None:
            return self.attached.entry
        return None if self.publishing is None else self.publishing.entry

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes that the weights take, by part; a tied embedding counts once."""
        products = [
            product
            for layer in self.layers
            for product in (layer.query_key_value, layer.output, layer.gate_up, layer.down)
        ]
        vectors = [self.norm, *(product.bias for product in products)]
        for layer in self.layers:
            vectors += [layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm]
        return {
            "embedding": self.embedding.nbytes,
            "linear": sum(product.weight.nbytes for product in products),
            "lm_head": 0 if self.head is self.embedding else self.head.nbytes,
            "norm": sum(vector.nbytes for vector in vectors if vector is not None),
        }

    def _check(self, segments: Sequence[Segment], cache: KVCache) -> None:
        """Refuse what would write beyond the cache: kernels do not look."""
        for one in segments:
            stop = one.start + one.length
            if min(one.base, one.start, one.length - 1) < 0 or one.base + stop > cache.tokens:
                raise ValueError(f"{one} is outside the cache, which has {cache.tokens} places")
            if stop > len(self.cosines):
                raise ValueError(f"{one} goes beyond the context, which has {len(self.cosines)} positions")

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], segments: Sequence[Segment], cache: KVCache, *, every_token: bool = False
    ) -> torch.Tensor:
        """Return logits (float32) after the last token of each segment, or after every token.

        `ids` are the new tokens of all segments, one after the other. Their keys and values are added to `cache`.
        """
        self._check(segments, cache)
        batch = _Batch(segments, self)
        epsilon = self.norm_epsilon
        x = self.embedding.lookup(torch.tensor(ids, device=self.device))
        for index, layer in enumerate(self.layers):
            qkv = layer.query_key_value(x, norm=layer.attention_norm, epsilon=epsilon)
            seen = batch.attend(qkv, layer, cache.keys[index], cache.values[index])
            x = layer.output(seen, residual=x)
            gate_up = layer.gate_up(x, norm=layer.mlp_norm, epsilon=epsilon)
            x = layer.down(gate_up, gated=True, residual=x)
        if not every_token and len(segments) < len(ids):
            x = x[batch.last]
        return self.head(x, norm=self.norm, epsilon=epsilon).float()


class _Batch:
    """Where the tokens of one forward pass belong, and what they see.

    Single new tokens go through the CPU's attention kernel together, where there is one; chunks of a prompt, and
    everything on other devices, go through torch, one sequence after the other.
    """

    def __init__(self, segments: Sequence[Segment], decoder: Decoder) -> None:
        self.decoder = decoder
        ends = list(accumulate(segment.length for segment in segments))
        self.last = torch.tensor(ends, device=decoder.device) - 1
        single: list[tuple[Segment, int]] = []
        self.by_torch: list[tuple[Segment, int]] = []
        for one, end in zip(segments, ends, strict=True):
            (single if one.length == 1 and decoder.attention is not None else self.by_torch).append((one, end))
        self.tokens = None
        if single:
            alone = [one for one, _ in single]
            self.tokens = Tokens(
                [end - 1 for _, end in single], [one.base for one in alone], [one.start for one in alone]
            )

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
        for segment, end in self.by_torch:
            rows = slice(end - segment.length, end)
            seen[rows] = self._attend_segment(qkv[rows], layer, segment, keys, values)
        return seen

    def _attend_segment(
        self, qkv: torch.Tensor, layer: Layer, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        decoder = self.decoder
        heads, groups = decoder.heads, decoder.kv_heads
        fused = qkv.view(-1, heads + 2 * groups, decoder.head_size)
        queries, new_keys, new_values = torch.split(fused, [heads, groups, groups], 1)
        if layer.query_norm is not None and layer.key_norm is not None:
            shape, epsilon = (decoder.head_size,), decoder.norm_epsilon
            queries = functional.rms_norm(queries, shape, layer.query_norm, epsilon)
            new_keys = functional.rms_norm(new_keys, shape, layer.key_norm, epsilon)
        positions = slice(segment.start, segment.start + segment.length)
        turn = (decoder.cosines[positions].unsqueeze(1), decoder.sines[positions].unsqueeze(1))
        stop = segment.base + positions.stop
        keys[:, stop - segment.length : stop] = rotate(new_keys, *turn).transpose(0, 1)
        values[:, stop - segment.length : stop] = new_values.transpose(0, 1)
        past = (keys[:, segment.base : stop].to(qkv.dtype), values[:, segment.base : stop].to(qkv.dtype))
        return attend(rotate(queries, *turn), *past, layer.window).reshape(segment.length, -1)
