"""What a decoder is made of: its parts, the tensors that each is stacked from, and how they are put together.

q, k and v are one product, and so are gate and up. Knows names; reads and quantises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loadstone.checkpoint.spec import ModelSpec
from loadstone.planner import Plan
from loadstone.quantization.linear import Linear

from .decoder import Decoder
from .layer import Layer, Product
from .rope import rope_tables

VECTOR = "vector"
Kept = Linear | torch.Tensor


@dataclass(frozen=True)
class Part:
    """One thing that a decoder keeps: a matrix of kind "linear", "embedding" or "lm_head", or a "vector".

    An embedding that is the head too is of the kind "lm_head", because it is multiplied. `tensors` are the
    checkpoint's, by the Hub's names; their rows follow one another in the part.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]


def parts_of(spec: ModelSpec) -> tuple[Part, ...]:
    """Return the parts of the decoder, in the order in which they are made.

    The two largest come first: what is made last has nothing beside it while it is written.
    """
    kind = "lm_head" if spec.tied_embeddings else "embedding"
    parts = [Part("embedding", kind, ("model.embed_tokens.weight",))]
    if not spec.tied_embeddings:
        parts.append(Part("lm_head", "lm_head", ("lm_head.weight",)))
    for index in range(spec.layers):
        parts += _layer_parts(spec, f"layers.{index}", f"model.layers.{index}")
    parts.append(Part("norm", VECTOR, ("model.norm.weight",)))
    return tuple(parts)


def _layer_parts(spec: ModelSpec, ours: str, theirs: str) -> list[Part]:
    parts = [Part(f"{ours}.attention_norm", VECTOR, (f"{theirs}.input_layernorm.weight",))]
    parts += _product_parts(spec, f"{ours}.query_key_value", *(f"{theirs}.self_attn.{one}_proj" for one in "qkv"))
    if spec.architecture.query_key_norm:
        parts += [
            Part(f"{ours}.{one}_norm", VECTOR, (f"{theirs}.self_attn.{one[0]}_norm.weight",))
            for one in ("query", "key")
        ]
    parts += _product_parts(spec, f"{ours}.output", f"{theirs}.self_attn.o_proj")
    parts.append(Part(f"{ours}.mlp_norm", VECTOR, (f"{theirs}.post_attention_layernorm.weight",)))
    parts += _product_parts(spec, f"{ours}.gate_up", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
    parts += _product_parts(spec, f"{ours}.down", f"{theirs}.mlp.down_proj")
    return parts


def _product_parts(spec: ModelSpec, name: str, *modules: str) -> list[Part]:
    parts = [Part(name, "linear", tuple(f"{module}.weight" for module in modules))]
    biases = tuple(f"{module}.bias" for module in modules if f"{module}.bias" in spec.tensors)
    return [*parts, Part(f"{name}.bias", VECTOR, biases)] if biases else parts


def assemble(plan: Plan, spec: ModelSpec, kept: Mapping[str, Kept]) -> Decoder:
    """Return the decoder whose parts these are, by name."""
    device, dtype = torch.device(plan.device.torch_name), getattr(torch, plan.settings.compute_dtype)
    embedding = _linear(kept, "embedding")
    cosines, sines = rope_tables(spec.rope, spec.head_size, plan.context, device, dtype)
    return Decoder(
        embedding, [_layer(spec, index, kept) for index in range(spec.layers)], _vector(kept, "norm"),
        embedding if spec.tied_embeddings else _linear(kept, "lm_head"), cosines, sines,
        heads=spec.heads, kv_heads=spec.kv_heads, head_size=spec.head_size, norm_epsilon=spec.norm_epsilon,
        device=device, dtype=dtype, cache_dtype=getattr(torch, plan.settings.cache_dtype),
    )  # fmt: skip


def taken_apart(spec: ModelSpec, decoder: Decoder) -> dict[str, Kept]:
    """Return a decoder's weights one by one, by the Hub's names: rows of its parts, over the same memory."""
    kept, found = decoder.parts(), dict[str, Kept]()
    for part in parts_of(spec):
        whole, start = kept[part.name], 0
        for name in part.tensors:
            stop = start + spec.tensors[name].shape[0]
            found[name] = whole.part(start, stop) if isinstance(whole, Linear) else whole[start:stop]
            start = stop
    return found


def _layer(spec: ModelSpec, index: int, kept: Mapping[str, Kept]) -> Layer:
    at = f"layers.{index}"

    def product(name: str) -> Product:
        bias = f"{at}.{name}.bias"
        return Product(_linear(kept, f"{at}.{name}"), _vector(kept, bias) if bias in kept else None)

    has_norms = spec.architecture.query_key_norm
    return Layer(
        attention_norm=_vector(kept, f"{at}.attention_norm"),
        query_key_value=product("query_key_value"),
        output=product("output"),
        mlp_norm=_vector(kept, f"{at}.mlp_norm"),
        gate_up=product("gate_up"),
        down=product("down"),
        query_norm=_vector(kept, f"{at}.query_norm") if has_norms else None,
        key_norm=_vector(kept, f"{at}.key_norm") if has_norms else None,
        window=spec.sliding_window if spec.windowed_layers[index] else None,
    )


def _linear(kept: Mapping[str, Kept], name: str) -> Linear:
    found = kept[name]
    if not isinstance(found, Linear):
        raise TypeError(f"part {name!r} is a vector, and must be a matrix")
    return found


def _vector(kept: Mapping[str, Kept], name: str) -> torch.Tensor:
    found = kept[name]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"part {name!r} is a matrix, and must be a vector")
    return found
