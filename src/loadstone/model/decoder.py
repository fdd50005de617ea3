"""The arithmetic of a pre-norm transformer with rotary positions and a gated MLP, for every known architecture.

Tokens of several sequences are computed as one flat list: products see N rows, attention sees segments. Knows
tokens and their places in the KV cache; nothing of text, requests or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..quantization.linear import Linear
from .attention import attend
from .cache import KVCache
from .rope import rotate

F = torch.nn.functional


@dataclass(frozen=True)
class Segment:
    """`length` new tokens of a sequence that holds the cache's places from `base` on; the first is at `start`."""

    base: int
    start: int
    length: int


@dataclass
class Product:
    """A weight and its bias: y = x·Wᵀ + b."""

    weight: Linear
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.weight(x)
        return y if self.bias is None else y.add_(self.bias)


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

    def new_cache(self, tokens: int) -> KVCache:
        """Return an empty KV cache for `tokens` tokens in all."""
        return KVCache(len(self.layers), self.kv_heads, tokens, self.head_size, self.device, self.cache_dtype)

    def release(self) -> None:
        """Let go of every weight, whoever still holds this object; it cannot be used after that."""
        vars(self).clear()

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

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], segments: Sequence[Segment], cache: KVCache, *, every_token: bool = False
    ) -> torch.Tensor:
        """Return logits (float32) after the last token of each segment, or after every token.

        `ids` are the new tokens of all segments, one after the other. Their keys and values are added to `cache`.
        """
        batch = _Batch(segments, self.device)
        x = self.embedding.lookup(torch.tensor(ids, device=self.device))
        turn = (self.cosines[batch.positions].unsqueeze(1), self.sines[batch.positions].unsqueeze(1))
        for index, layer in enumerate(self.layers):
            x = x + self._attention(layer, self._normed(x, layer.attention_norm), turn, batch, cache, index)
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate).mul_(up))
        if not every_token and len(segments) < len(ids):
            x = x[batch.last]
        return self.head(self._normed(x, self.norm)).float()

    def _attention(
        self, layer: Layer, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], batch: _Batch,
        cache: KVCache, index: int,
    ) -> torch.Tensor:  # fmt: skip
        heads, groups = self.heads, self.kv_heads
        fused = layer.query_key_value(x).view(-1, heads + 2 * groups, self.head_size)
        if layer.query_norm is None:
            turned = rotate(fused[:, : heads + groups], *turn)
            queries, keys = turned[:, :heads], turned[:, heads:]
        else:
            queries = rotate(self._normed(fused[:, :heads], layer.query_norm), *turn)
            keys = rotate(self._normed(fused[:, heads : heads + groups], layer.key_norm), *turn)
        values = fused[:, heads + groups :]
        seen = batch.attend(queries, keys, values, cache.keys[index], cache.values[index], layer.window)
        return layer.output(seen.reshape(x.shape[0], heads * self.head_size))

    def _normed(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.norm_epsilon)


class _Batch:
    """Where the tokens of one forward pass belong."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        positions: list[int] = []
        for segment in segments:
            positions.extend(range(segment.start, segment.start + segment.length))
        self.positions = torch.tensor(positions, device=device)
        self.last = torch.tensor([segment.length for segment in segments], device=device).cumsum(0) - 1

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, all_keys: torch.Tensor,
        all_values: torch.Tensor, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Add keys and values (N × kv_heads × head_size) to the cache, and return what the queries see."""
        seen = torch.empty_like(queries)
        at = 0
        for segment in self.segments:
            here = slice(at, at + segment.length)
            stop = segment.base + segment.start + segment.length
            all_keys[:, stop - segment.length : stop] = keys[here].transpose(0, 1)
            all_values[:, stop - segment.length : stop] = values[here].transpose(0, 1)
            past = (all_keys[:, segment.base : stop], all_values[:, segment.base : stop])
            seen[here] = attend(queries[here].to(all_keys.dtype), *past, window)
            at += segment.length
        return seen
