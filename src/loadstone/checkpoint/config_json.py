"""Reads config.json and generation_config.json strictly: every size checked before anything believes it.

Knows the keys of config.json and their bounds; `layout.py` knows the tensors that follow from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadstone.errors import CheckpointError
from loadstone.telemetry import emit

from .architectures import Architecture, find_architecture, known_architectures
from .layout import Sizes
from .rope import rope_settings

# Far above any model there is: they keep a damaged file from asking for absurd work.
_BOUNDS = {
    "hidden_size": 2**20, "num_hidden_layers": 2**12, "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14, "head_dim": 2**14, "intermediate_size": 2**22, "vocab_size": 2**24,
    "max_position_embeddings": 2**31, "sliding_window": 2**31, "max_window_layers": 2**31,
}  # fmt: skip
_REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_DEFAULT_WINDOW = 4096  # tokens; what mistral and qwen mean when the key is absent
_DEFAULT_WINDOW_LAYERS = 28
_ANOTHER = "Fetch the checkpoint again, or name another one."


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; raise CheckpointError when it cannot be read or is not one."""
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("it is missing", file=file, hint=_ANOTHER) from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}", file=file) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is not valid JSON: {error}", file=file, hint=_ANOTHER) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"it holds a JSON {type(value).__name__}, not an object", file=file, hint=_ANOTHER)
    return value


def read_generation(folder: Path) -> dict[str, Any]:
    """Return generation_config.json, or nothing when it is absent or (with a `checkpoint.warning`) bad."""
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    try:
        return read_json(file)
    except CheckpointError as error:
        emit("checkpoint.warning", reason=error.message, file=str(file))
        return {}


def architecture_of(config: Mapping[str, Any], file: Path) -> Architecture:
    """Return the architecture that `config` names; raise CheckpointError when it is not known or not read."""
    name = config.get("model_type")
    architecture = find_architecture(name) if isinstance(name, str) else None
    if architecture is None:
        said = f"architecture {name!r} is not known" if name else "'model_type' is missing"
        raise CheckpointError(
            f"{said}; known are {', '.join(known_architectures())}", file=file,
            hint="Choose a model of one of these, or make yours known with `register_architecture`.",
        )  # fmt: skip
    return architecture


def sizes_of(config: Mapping[str, Any], architecture: Architecture, file: Path) -> Sizes:
    """Return the sizes that `config` states, checked against bounds and one another.

    Raises CheckpointError naming the file, the key and what it holds.
    """
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{', '.join(missing)} missing", file=file, hint=_ANOTHER)
    hidden, layers, heads, inner, vocab, positions = (_count(config, key, file) for key in _REQUIRED)
    kv_heads = _count(config, "num_key_value_heads", file, default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}", file=file
        )
    head_size = _head_size(config, architecture, hidden, heads, file)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"hidden_act {activation!r} is not known; known is silu", file=file)
    attention_bias = _flag(config, "attention_bias", file)
    bias = attention_bias if architecture.qkv_bias is None else architecture.qkv_bias
    rope, max_context = rope_settings(config, positions, head_size, file)
    windowed = _windowed_layers(config, architecture, layers, file)
    return Sizes(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        intermediate_size=inner,
        vocab_size=vocab,
        max_context=max_context,
        norm_epsilon=_epsilon(config, file),
        tied_embeddings=_flag(config, "tie_word_embeddings", file),
        qkv_bias=bias,
        # Only where config.json decides on biases does its word cover o_proj too.
        output_bias=architecture.qkv_bias is None and _flag(config, "attention_output_bias", file, bias),
        mlp_bias=_flag(config, "mlp_bias", file),
        hidden_act=activation,
        rope=rope,
        sliding_window=_count(config, "sliding_window", file, _DEFAULT_WINDOW) if any(windowed) else None,
        windowed_layers=windowed,
    )


def token_ids(value: Any, key: str, file: Path) -> tuple[int, ...]:
    """Return the token ids in `value`: none, one or a list; raise CheckpointError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(one) is not int or not 0 <= one < _BOUNDS["vocab_size"] for one in ids):
        raise CheckpointError(f"{key} is {value!r}; it must be a token's number or a list of them", file=file)
    return tuple(ids)


def _count(config: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    bound = _BOUNDS[key]
    if type(value) is not int or not 1 <= value <= bound:
        raise CheckpointError(f"{key} is {value!r}; it must be a whole number from 1 to {bound}", file=file)
    return value


def _flag(config: Mapping[str, Any], key: str, file: Path, default: bool = False) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r}; it must be true or false", file=file)
    return value


def _epsilon(config: Mapping[str, Any], file: Path) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise CheckpointError(f"rms_norm_eps is {value!r}; it must be a small number above 0", file=file)
    return float(value)


def _head_size(config: Mapping[str, Any], architecture: Architecture, hidden: int, heads: int, file: Path) -> int:
    default = architecture.default_head_size
    if config.get("head_dim") is None and default is None and hidden % heads:
        raise CheckpointError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is missing",
            file=file,
        )
    size = _count(config, "head_dim", file, default=default or hidden // heads)
    if size % 2:
        raise CheckpointError(f"the size of a head, {size}, is odd: its positions cannot be rotated", file=file)
    return size


def _windowed_layers(
    config: Mapping[str, Any], architecture: Architecture, layers: int, file: Path
) -> tuple[bool, ...]:
    rule = architecture.sliding_window
    explicit_none = "sliding_window" in config and config["sliding_window"] is None
    if rule == "never" or explicit_none:
        return (False,) * layers
    if rule == "always":
        return (True,) * layers
    if not _flag(config, "use_sliding_window", file):
        return (False,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", _DEFAULT_WINDOW_LAYERS)
        if type(first) is not int or first < 0:
            raise CheckpointError(f"max_window_layers is {first!r}; it must be a whole number", file=file)
        return tuple(layer >= first for layer in range(layers))
    known = {"full_attention": False, "sliding_attention": True}
    names = list(known)  # a list compares, where a mapping would hash what a file may hold
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in names for kind in kinds):
        raise CheckpointError(
            f"layer_types must name one of {', '.join(known)} for each of the {layers} layers", file=file
        )
    return tuple(known[kind] for kind in kinds)
