"""Gives a GGUF header the Hub's words: names of tensors, and metadata as the keys of config.json.

Knows which metadata mean what; `config_json.py` checks the values and `layout.py` the tensors.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from loadstone.errors import CheckpointError

from .architectures import Architecture, find_gguf_architecture, known_architectures
from .coding import Quantized
from .gguf import BLOCKS, GgufHeader
from .spec import TensorInfo

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.([a-z_]+)\.(weight|bias)")
_KEYS = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "rms_norm_eps")
_ENDS = ("eos", "eot", "eom")
_SAMPLING = {
    "general.sampling.temp": "temperature", "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p", "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}  # fmt: skip
FREQUENCIES = "rope_freqs.weight"


def hub_name(stored: str) -> str:
    """Return the Hub's name of the tensor stored as `stored`; an unknown name stays as it is."""
    match = _BLOCK.fullmatch(stored)
    if match is None or match[2] not in _INSIDE:
        return _OUTSIDE.get(stored, stored)
    return f"model.layers.{match[1]}.{_INSIDE[match[2]]}.{match[3]}"


def hub_tensors(header: GgufHeader) -> dict[str, TensorInfo]:
    """Return the header's tensors under the Hub's names; what is unpacked by blocks keeps its type's name."""
    return {hub_name(stored): replace(one, name=hub_name(stored)) for stored, one in header.tensors.items()}


def architecture_of(header: GgufHeader) -> Architecture:
    """Return the architecture that the file names; raise CheckpointError when it is unknown or split up."""
    name = header.metadata.get("general.architecture")
    window = header.metadata.get(f"{name}.attention.sliding_window")
    architecture = find_gguf_architecture(name, windowed=bool(window)) if isinstance(name, str) else None
    if architecture is None:
        raise CheckpointError(
            f"architecture {name!r} is not known; known are {', '.join(known_architectures())}",
            file=header.file,
            hint="Choose a model of one of these, or make yours known with `register_architecture`.",
        )
    parts = header.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"it is one of {parts} parts of a model, which are not read", file=header.file,
            hint="Join them with llama.cpp's `llama-gguf-split --merge`, or use a file that is whole.",
        )  # fmt: skip
    return architecture


def config_of(header: GgufHeader, architecture: Architecture) -> dict[str, Any]:
    """Return what the metadata say as the keys of config.json; raise CheckpointError for what is not read."""
    prefix = architecture.gguf_name
    config: dict[str, Any] = {"model_type": architecture.name}
    missing = []
    for key, suffix in _KEYS.items():
        value = _uniform(header, f"{prefix}.{suffix}")
        if value is None and key not in _OPTIONAL:
            missing.append(f"{prefix}.{suffix}")
        config[key] = value
    if missing:
        _refuse(header, f"metadata {', '.join(missing)} missing")
    if config["rms_norm_eps"] is None:
        del config["rms_norm_eps"]
    config["head_dim"] = _head_size(header, prefix, config)
    config["vocab_size"] = _vocabulary(header, prefix)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config["attention_output_bias"] = "blk.0.attn_output.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    window = header.metadata.get(f"{prefix}.attention.sliding_window")
    config["sliding_window"] = window or None
    config["use_sliding_window"] = bool(window)
    config["rope_parameters"] = _rope(header, prefix)
    tokens = {end: header.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", *_ENDS)}
    config["bos_token_id"] = tokens["bos"]
    config["eos_token_id"] = [tokens[end] for end in _ENDS if tokens[end] is not None]
    return config


def sampling_of(header: GgufHeader) -> dict[str, Any]:
    """Return the sampling that the file recommends, as the keys of generation_config.json."""
    found = {key: header.metadata.get(stored) for stored, key in _SAMPLING.items()}
    return {key: value for key, value in found.items() if value is not None}


def quantized_of(tensors: Mapping[str, TensorInfo]) -> Quantized | None:
    """Return how the layers' matrices are packed, going by the type of most of them; None where they are floats."""
    numbers: dict[str, int] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and ".layers." in name:
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.elements
    most = max(numbers, key=lambda dtype: numbers[dtype])
    if BLOCKS[most][0] == 1:
        return None
    return Quantized("gguf", f"GGUF {most}", int(most[1]))  # Q6_K: the digit is its bits


def _refuse(header: GgufHeader, reason: str) -> NoReturn:
    raise CheckpointError(reason, file=header.file, hint="Use another conversion of this model.")


def _uniform(header: GgufHeader, key: str) -> Any:
    """One value for all layers; some architectures state a list with one for each."""
    value = header.metadata.get(key)
    if isinstance(value, list):
        if not value or any(one != value[0] for one in value):
            _refuse(header, f"metadata {key!r} differs from layer to layer, which is not read")
        return value[0]
    return value


def _head_size(header: GgufHeader, prefix: str, config: Mapping[str, Any]) -> int | None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = header.metadata.get(f"{prefix}.attention.key_length")
    value_size = header.metadata.get(f"{prefix}.attention.value_length", size)
    if value_size != size:
        _refuse(header, f"its keys have {size!r} numbers a head and its values {value_size!r}; only equal is read")
    if size is None and type(hidden) is int and type(heads) is int and heads > 0 and hidden % heads == 0:
        size = hidden // heads
    rotated = header.metadata.get(f"{prefix}.rope.dimension_count", size)
    if rotated != size:
        _refuse(header, f"it rotates {rotated!r} of the {size!r} numbers of a head; only all is read")
    return size


def _vocabulary(header: GgufHeader, prefix: str) -> Any:
    # The embedding decides: the vocabulary in the metadata may leave out the padding.
    embedding = header.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else header.metadata.get(f"{prefix}.vocab_size", 0)


def _rope(header: GgufHeader, prefix: str) -> dict[str, Any]:
    metadata = header.metadata
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}.rope.freq_base")}
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    old_factor = metadata.get(f"{prefix}.rope.scale_linear")
    if kind == "none" and old_factor not in (None, 1.0):
        kind = "linear"
    factors = _frequencies(header)
    if factors is not None:
        if kind != "none":
            _refuse(header, f"it scales its positions twice: rope scaling {kind!r} and {FREQUENCIES}")
        return {**rope, "rope_type": "factors", "factors": factors}
    if kind == "none":
        return rope
    scaling = f"{prefix}.rope.scaling."
    rope |= {"rope_type": kind, "factor": metadata.get(scaling + "factor", old_factor)}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = metadata.get(scaling + "original_context_length")
        for key in ("beta_fast", "beta_slow"):
            rope[key] = metadata.get(scaling + "yarn_" + key)
        share, factor = metadata.get(scaling + "attn_factor"), rope["factor"]
        if isinstance(share, float) and isinstance(factor, float) and factor >= 1:
            # llama.cpp multiplies yarn's own temperature by this share; config.json states the product.
            rope["attention_factor"] = share * (0.1 * math.log(factor) + 1.0)
    return rope


def _frequencies(header: GgufHeader) -> list[float] | None:
    """llama3's scaling, worked out by the converter: what divides each frequency. None when all are 1."""
    tensor = header.tensors.get(FREQUENCIES)
    if tensor is None:
        return None
    if tensor.dtype != "F32" or len(tensor.shape) != 1 or tensor.elements > 2**14:
        _refuse(header, f"tensor {FREQUENCIES!r} is not a short list of F32")
    factors = list(struct.unpack(f"<{tensor.elements}f", header.opened.read(tensor.offset, tensor.nbytes)))
    return None if all(factor == 1.0 for factor in factors) else factors
