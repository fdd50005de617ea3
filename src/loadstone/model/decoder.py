"""The arithmetic of a pre-norm transformer with rotary positions and a gated MLP, for every known architecture.

Tokens of several sequences are computed as one flat list: products see N rows, attention sees segments. Knows
tokens and their places in the KV cache; nothing of text, requests or sampling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from loadstone._blake3 import Digest
from loadstone.quantization.kernels.cpu import cpu_kernels
from loadstone.quantization.kernels.words import KV_BLOCK
from loadstone.quantization.linear import Linear
from loadstone.store import Attached, Entry

from .batch import Batch, Segment, wanted_rows
from .cache import KVCache, block_table_of
from .layer import Layer
from .publishing import Publishing
from .static import Rows
from .step import Steps


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
        self.steps: WeakKeyDictionary[KVCache, Steps] = WeakKeyDictionary()

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

    def identity(self) -> str:
        """Return what keys and values depend on, digested: the same for the same weights, kept the same way.

        Waits until the weights are in the store, since they are told by their entry there.
        """
        self.settle()
        made_of = Digest()
        if self.entry is not None:
            made_of.update(self.entry.manifest.key.encode())
        else:
            products = [product.weight for layer in self.layers for product in layer.products]
            weights = [one for weight in (self.embedding, *products, self.head) for one in weight.tensors().values()]
            for tensor in (*weights, *self._vectors()):
                made_of.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for table in (self.cosines, self.sines):  # some ways to stretch a context change them with its length
            made_of.update(table[:64].cpu().float().numpy().tobytes())
        windows = [layer.window for layer in self.layers]
        made_of.update(f"{self.cache_dtype} {self.device.type} {self.norm_epsilon} {windows}".encode())
        return made_of.hex()

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
        vectors = self._vectors()
        products = [product for layer in self.layers for product in layer.products]
        return {
            "embedding": self.embedding.nbytes,
            "linear": sum(product.weight.nbytes for product in products),
            "lm_head": 0 if self.head is self.embedding else self.head.nbytes,
            "norm": sum(vector.nbytes for vector in vectors),
        }

    def parts(self) -> dict[str, Linear | torch.Tensor]:
        """Return all matrices and then all vectors, by the names of `recipe.parts_of`; a tied embedding comes once."""
        matrices = {"embedding": self.embedding} | ({} if self.head is self.embedding else {"lm_head": self.head})
        vectors: dict[str, torch.Tensor | None] = {"norm": self.norm}
        for index, layer in enumerate(self.layers):
            at = f"layers.{index}"
            for name in ("query_key_value", "output", "gate_up", "down"):
                product = getattr(layer, name)
                matrices[f"{at}.{name}"] = product.weight
                vectors[f"{at}.{name}.bias"] = product.bias
            for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm"):
                vectors[f"{at}.{name}"] = getattr(layer, name)
        return {**matrices, **{name: vector for name, vector in vectors.items() if vector is not None}}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Go through all tensors that keep weights, with the name of their part; a tied embedding comes once."""
        for name, part in self.parts().items():
            yield from ((name, tensor) for tensor in (part.tensors().values() if isinstance(part, Linear) else [part]))

    def _vectors(self) -> list[torch.Tensor]:
        """Return all norms and biases."""
        vectors = [self.norm]
        for layer in self.layers:
            every = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
            vectors += [one for one in (*every, *(product.bias for product in layer.products)) if one is not None]
        return vectors

    def _check(self, segments: Sequence[Segment], cache: KVCache) -> None:
        """Refuse what would write beyond the cache: kernels do not look."""
        for one in segments:
            stop = one.start + one.length
            places = len(one.block_table) * KV_BLOCK
            if min(one.start, one.length - 1) < 0 or stop > places:
                raise ValueError(f"{one} is outside its sequence, which holds {places} places")
            if not 1 <= one.wanted <= one.length:
                raise ValueError(f"{one} has no {one.wanted} tokens to return logits of")
            if stop > len(self.cosines):
                raise ValueError(f"{one} goes beyond the context, which has {len(self.cosines)} positions")

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], segments: Sequence[Segment], cache: KVCache) -> torch.Tensor:
        """Return logits (float32) after the last tokens of each segment, as many as are `wanted`, one after the other.

        `ids` are the new tokens of all segments, one after the other. Their keys and values are added to `cache`.
        """
        self._check(segments, cache)
        if self.attached is not None:
            self.attached.note_lookups(len(ids))
        step = self.steps.setdefault(cache, Steps()).of(self, cache, segments, len(ids))
        x = step(self, ids, segments) if step is not None else self._read(ids, segments, cache)
        return self.head(x, norm=self.norm, epsilon=self.norm_epsilon).float()

    def _read(self, ids: Sequence[int], segments: Sequence[Segment], cache: KVCache) -> torch.Tensor:
        """Return the states of the rows that are wanted, for tokens of any number: chunks of prompts among them."""
        x = self.through_layers(torch.tensor(ids, device=self.device), Batch(segments, self), cache.keys, cache.values)
        wanted = wanted_rows(segments)
        return x if len(wanted) == len(ids) else x[torch.tensor(wanted, device=self.device)]

    def through_layers(
        self, ids: torch.Tensor, seen: Batch | Rows, keys: Iterable[torch.Tensor], values: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        """Return the states of tokens (N, int64, on the device) after the last layer, N × hidden.

        `seen` says where their keys and values go and what they see; `keys` and `values` are the cache's, by layer.
        """
        x = self.embedding.lookup(ids)
        for layer, own_keys, own_values in zip(self.layers, keys, values, strict=True):
            x = self._layer(x, layer, seen, own_keys, own_values)
        return x

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits after each token of a text that is read by itself: T × vocabulary, float32."""
        cache = self.new_cache(len(ids))
        table = block_table_of(cache.take(cache.blocks))
        return self.forward(ids, [Segment(table, 0, len(ids), wanted=len(ids))], cache)

    def _layer(
        self, x: torch.Tensor, layer: Layer, seen: Batch | Rows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        epsilon = self.norm_epsilon
        qkv = layer.query_key_value(x, norm=layer.attention_norm, epsilon=epsilon)
        x = layer.output(seen.attend(qkv, layer, keys, values), residual=x)
        gate_up = layer.gate_up(x, norm=layer.mlp_norm, epsilon=epsilon)
        return layer.down(gate_up, gated=True, residual=x)
