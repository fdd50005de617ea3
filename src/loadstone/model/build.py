"""Plan + checkpoint → decoder: reads each tensor once, quantises it, and lets go of it.

Peak memory is the finished decoder and the tensors of the one product being made: what was read is given back
before the next product begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import torch

from loadstone.checkpoint.spec import ModelSpec
from loadstone.planner import Plan
from loadstone.quantization import Strategy, find_strategy
from loadstone.quantization.kernels.openmp import end_workers
from loadstone.quantization.linear import Linear
from loadstone.telemetry import emit

from .decoder import Decoder, Layer, Product
from .rope import rope_tables

AHEAD_BYTES = 512 << 20  # into the system's page cache, which it can take back; not this process's memory
_FLOATS = ("BF16", "F16", "F32")  # types on disk that are kept as they are
_PACKED_KEPT_AS = torch.float16  # GGUF's packed types, under `none`: float32 would double what they take


Made = TypeVar("Made")


class WeightReader(Protocol):
    """What a checkpoint gives: a tensor by its Hub name, and a word that it is needed soon, or not any more."""

    def read(self, name: str) -> torch.Tensor: ...
    def prefetch(self, name: str) -> None: ...
    def release(self, name: str) -> None: ...


def build(plan: Plan, spec: ModelSpec, weights: WeightReader) -> Decoder:
    """Return the decoder that `plan` describes, made from a checkpoint's weights.

    Emits `load.progress` (bytes done, bytes in all) after each product, and `load.warning` when weights hold NaN or
    infinity. Sets how many threads torch uses to what the plan says. Whatever it raises, nothing it made remains.
    """
    if plan.settings.threads:
        torch.set_num_threads(plan.settings.threads)
    try:
        return _Builder(plan, spec, weights).build()
    finally:
        end_workers()  # the thread that answers is another one


class _Builder:
    def __init__(self, plan: Plan, spec: ModelSpec, weights: WeightReader) -> None:
        self.plan, self.spec, self.weights = plan, spec, weights
        self.device = torch.device(plan.device.torch_name)
        self.dtype: torch.dtype = getattr(torch, plan.settings.compute_dtype)
        self.strategy: Strategy = find_strategy(plan.strategy)
        self.done_bytes = 0
        self.asked_bytes = 0
        self.to_ask = iter(spec.tensors.values())
        self.total_bytes = sum(tensor.nbytes for tensor in spec.tensors.values())

    def build(self) -> Decoder:
        spec = self.spec
        embedding = self._weight("embedding", "model.embed_tokens.weight")
        layers = [self._layer(index) for index in range(spec.layers)]
        norm = self._vector("model.norm.weight")
        head = embedding if spec.tied_embeddings else self._weight("lm_head", "lm_head.weight")
        cosines, sines = rope_tables(spec.rope, spec.head_size, self.plan.context, self.device, self.dtype)
        return Decoder(
            embedding, layers, norm, head, cosines, sines,
            heads=spec.heads, kv_heads=spec.kv_heads, head_size=spec.head_size, norm_epsilon=spec.norm_epsilon,
            device=self.device, dtype=self.dtype, cache_dtype=getattr(torch, self.plan.settings.cache_dtype),
        )  # fmt: skip

    def _layer(self, index: int) -> Layer:
        at = f"model.layers.{index}"
        has_norms = self.spec.architecture.query_key_norm
        attention = [f"{at}.self_attn.{name}_proj" for name in ("q", "k", "v")]
        return Layer(
            attention_norm=self._vector(f"{at}.input_layernorm.weight"),
            query_key_value=self._product(*attention),
            output=self._product(f"{at}.self_attn.o_proj"),
            mlp_norm=self._vector(f"{at}.post_attention_layernorm.weight"),
            gate_up=self._product(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
            down=self._product(f"{at}.mlp.down_proj"),
            query_norm=self._vector(f"{at}.self_attn.q_norm.weight") if has_norms else None,
            key_norm=self._vector(f"{at}.self_attn.k_norm.weight") if has_norms else None,
            window=self.spec.sliding_window if self.spec.windowed_layers[index] else None,
        )

    def _product(self, *names: str) -> Product:
        weight = self._weight("linear", *(f"{name}.weight" for name in names))
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self.spec.tensors]
        return Product(weight, torch.cat([self._vector(bias) for bias in biases]) if biases else None)

    def _weight(self, part: str, *names: str) -> Linear:
        def make(tensors: Sequence[torch.Tensor]) -> Linear:
            plain = [self._plain(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
            return self.strategy.quantize(part, plain, self.device, self.dtype)

        made = self._reading(names, make)
        _warn_unless_finite(names, made.tensors().values())
        return made

    def _vector(self, name: str) -> torch.Tensor:
        made = self._reading([name], lambda tensors: tensors[0].to(self.device, self.dtype, copy=True))
        _warn_unless_finite([name], [made])
        return made

    def _plain(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a packed type's numbers in 16 bits when they stay unquantised."""
        is_packed = self.spec.tensors[name].dtype not in _FLOATS
        return tensor.to(_PACKED_KEPT_AS) if is_packed and self.plan.strategy == "none" else tensor

    def _reading(self, names: Sequence[str], make: Callable[[Sequence[torch.Tensor]], Made]) -> Made:
        self._fetch_ahead()
        made = make([self.weights.read(name) for name in names])
        for name in names:
            self.weights.release(name)
            self.done_bytes += self.spec.tensors[name].nbytes
        emit("load.progress", done=self.done_bytes, total=self.total_bytes)
        return made

    def _fetch_ahead(self) -> None:
        """Have the system read from the disk what comes next, while this thread computes."""
        while self.asked_bytes < self.done_bytes + AHEAD_BYTES and (tensor := next(self.to_ask, None)):
            self.weights.prefetch(tensor.name)
            self.asked_bytes += tensor.nbytes


def _warn_unless_finite(names: Sequence[str], kept: Iterable[torch.Tensor]) -> None:
    for tensor in kept:
        if not tensor.is_floating_point():
            continue
        extremes = torch.stack(torch.aminmax(tensor))  # one pass and no copy; NaN comes through as both
        if not bool(torch.isfinite(extremes).all()):
            emit("load.warning", reason="weights hold NaN or infinity; answers may be noise", tensors=list(names))
            return
