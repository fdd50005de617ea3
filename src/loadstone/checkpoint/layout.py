"""Which tensors a model must have, by architecture and sizes, and the check that a checkpoint has them.

Names and shapes are the Hub's. Knows nothing of files or formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.errors import CheckpointError
from loadstone.telemetry import emit

from .architectures import Architecture
from .spec import TensorInfo

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# Buffers that older libraries saved beside the weights; all of them can be computed.
_HARMLESS = re.compile(r"\.rotary_emb\.|\.masked_bias$|\.attn\.bias$|^rope_freqs\.|^rope_factors_")
_SHOWN = 5


@dataclass(frozen=True)
class Sizes:
    """What config.json says about a model's sizes; each field is the one of `ModelSpec` with its name."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    hidden_act: str
    rope: Mapping[str, Any]
    sliding_window: int | None
    windowed_layers: tuple[bool, ...]


def expected_tensors(architecture: Architecture, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that such a model has, by name, in the order of the computation."""
    hidden = sizes.hidden_size
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (sizes.vocab_size, hidden)}
    for layer in range(sizes.layers):
        for name, shape in _layer_tensors(architecture, sizes).items():
            expected[f"model.layers.{layer}.{name}"] = shape
    expected["model.norm.weight"] = (hidden,)
    if not sizes.tied_embeddings:
        expected[LM_HEAD] = (sizes.vocab_size, hidden)
    return expected


def _layer_tensors(architecture: Architecture, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    query, key = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    products = (
        ("self_attn.q_proj", query, hidden, sizes.qkv_bias),
        ("self_attn.k_proj", key, hidden, sizes.qkv_bias),
        ("self_attn.v_proj", key, hidden, sizes.qkv_bias),
        ("self_attn.o_proj", hidden, query, sizes.output_bias),
        ("mlp.gate_proj", inner, hidden, sizes.mlp_bias),
        ("mlp.up_proj", inner, hidden, sizes.mlp_bias),
        ("mlp.down_proj", hidden, inner, sizes.mlp_bias),
    )
    tensors: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows, columns, has_bias in products:
        tensors[f"{name}.weight"] = (rows, columns)
        if has_bias:
            tensors[f"{name}.bias"] = (rows,)
    if architecture.query_key_norm:
        tensors["self_attn.q_norm.weight"] = (sizes.head_size,)
        tensors["self_attn.k_norm.weight"] = (sizes.head_size,)
    tensors["post_attention_layernorm.weight"] = (hidden,)
    return tensors


def select_tensors(
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    readable: Iterable[str],
    place: Path,
) -> dict[str, TensorInfo]:
    """Return the tensors of `found` that the model needs, in the order of `expected`.

    Raises CheckpointError when one is missing, has another shape, or a type outside `readable`. Others are
    left out, with a `checkpoint.warning` event when they are not known to be harmless.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"{_listed(missing, 'tensor')} missing", file=place, hint=_missing_hint(missing))
    types = tuple(readable)
    for name, shape in expected.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}; its sizes ask for {list(shape)}",
                file=tensor.file,
                hint="The settings and the weights are of different models, or damaged: fetch both again.",
            )
        if tensor.coding is None and tensor.dtype not in types:
            raise CheckpointError(
                f"tensor {tensor.stored_name!r} is of type {tensor.dtype}; read are {', '.join(types)}",
                file=tensor.file,
                hint="Use a file of the same model in one of these types.",
            )
    unknown = [name for name in found if name not in expected and name != LM_HEAD and not _HARMLESS.search(name)]
    if unknown:
        emit(
            "checkpoint.warning", reason="tensors not used by this architecture", count=len(unknown),
            tensors=unknown[:_SHOWN], file=str(place),
        )  # fmt: skip
    return {name: found[name] for name in expected}


def _listed(names: list[str], noun: str) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    if len(names) == 1:
        return f"{noun} {shown} is"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{noun}s {shown}{more} are"


def _missing_hint(missing: list[str]) -> str:
    if missing == [LM_HEAD]:
        return "If the model shares it with the embedding, config.json must say `tie_word_embeddings: true`."
    return "A shard may be missing, or the settings belong to another model: fetch the checkpoint again."
