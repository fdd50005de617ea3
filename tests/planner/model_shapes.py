"""Specs with the exact shapes of known models, made without any file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadstone.checkpoint.architectures import Architecture
from loadstone.checkpoint.spec import ModelSpec, TensorInfo
from loadstone.hardware import Device, MemorySettings

GB = 10**9
BYTES = {"BF16": 2, "F16": 2, "F32": 4}
CPU_SETTINGS = MemorySettings("float32", "float32", 512, 2, ("float32: tested",))
GPU_SETTINGS = MemorySettings("bfloat16", "bfloat16", 2048, 0)


def make_spec(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocab: int,
    tied: bool = False,
    max_context: int = 32768,
    dtype: str = "BF16",
    name: str = "test",
) -> ModelSpec:
    """Return the spec of a qwen2 of these sizes, every tensor with its header."""
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection, rows in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return ModelSpec(
        name=name,
        architecture=Architecture("qwen2", qkv_bias=True),
        format="safetensors",
        origin="made for a test",
        revision=None,
        folder=Path(),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head,
        intermediate_size=inner,
        vocab_size=vocab,
        max_context=max_context,
        norm_epsilon=1e-6,
        tied_embeddings=tied,
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        rope={"rope_theta": 1e6},
        sliding_window=None,
        windowed_layers=(False,) * layers,
        tensors=_headers(shapes, dtype),
    )


def qwen_7b(**changes: Any) -> ModelSpec:
    """Return Qwen2.5-7B-Instruct's shapes."""
    sizes: dict[str, Any] = {
        "layers": 28,
        "hidden": 3584,
        "heads": 28,
        "kv_heads": 4,
        "inner": 18944,
        "vocab": 152064,
        "name": "Qwen2.5-7B-Instruct",
    }
    return make_spec(**{**sizes, **changes})


def tiny(**changes: Any) -> ModelSpec:
    """Return a small model, quick to plan."""
    sizes: dict[str, Any] = {
        "layers": 2,
        "hidden": 128,
        "heads": 4,
        "kv_heads": 2,
        "inner": 256,
        "vocab": 1000,
    }
    return make_spec(**{**sizes, **changes})


def cpu(free: int, total: int | None = None) -> Device:
    """Return a processor with this much free memory, all of it free unless told."""
    return Device("cpu", None, "Test CPU", total or free, free, cores=2, reason="no accelerator can be used")


def _headers(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, TensorInfo]:
    headers: dict[str, TensorInfo] = {}
    offset = 0
    for name, shape in shapes.items():
        elements = 1
        for length in shape:
            elements *= length
        size = elements * BYTES.get(dtype, 1)
        headers[name] = TensorInfo(name, shape, dtype, Path("model.safetensors"), offset, size, name)
        offset += size
    return headers
