"""Reads how positions are rotated: config.json's rope settings in their old and new spelling, as one mapping.

Knows the names and the bounds of the parameters; the decoder knows what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadstone.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "factors")
_DEFAULT_THETA = 10_000.0
_NUMBERS = {
    "linear": (), "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def rope_settings(
    config: Mapping[str, Any], max_positions: int, head_size: int, file: Path
) -> tuple[dict[str, Any], int]:
    """Return the rope settings of a config.json, normalised, and the longest context they allow, in tokens.

    Reads `rope_parameters`, or `rope_scaling` with `rope_theta` beside it. The mapping has `rope_theta` and
    `rope_type` always. When positions are scaled it has the type's parameters: `factor` (all), and for yarn,
    llama3 and dynamic `original_max_position_embeddings`. Type "factors" has `factors`, the head_size / 2
    numbers that divide the frequencies. Raises CheckpointError for an unknown type or a parameter out of
    bounds.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"its rope settings {given!r} are not an object", file=file)
    if any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError("rope settings that differ from layer to layer are not read", file=file)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"rope type {kind!r} is not known; known are {', '.join(ROPE_TYPES)}", file=file,
            hint="Use another checkpoint of this model, or remove the scaling and keep to its short context.",
        )  # fmt: skip
    theta = given.get("rope_theta", config.get("rope_theta"))
    rope: dict[str, Any] = {
        "rope_theta": _number(_DEFAULT_THETA if theta is None else theta, "rope_theta", file),
        "rope_type": kind,
    }
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise CheckpointError(f"partial_rotary_factor {partial!r} is not read; only 1 is", file=file)
    if kind == "default":
        return rope, max_positions
    if kind == "factors":
        return {**rope, "factors": _factors(given.get("factors"), head_size, file)}, max_positions
    return _scaled(rope, given, config, max_positions, file)


def _scaled(
    rope: dict[str, Any], given: Mapping[str, Any], config: Mapping[str, Any], max_positions: int, file: Path
) -> tuple[dict[str, Any], int]:
    kind = rope["rope_type"]
    # The dynamic type stretches from the model's own length; the others may name the length before scaling.
    original = max_positions
    if kind in ("yarn", "llama3"):
        named = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        original = max_positions if named is None else _count(named, "original_max_position_embeddings", file)
    if kind != "linear":
        rope["original_max_position_embeddings"] = original
    factor = given.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
    rope["factor"] = _number(factor, "factor", file, least=1.0)
    for key in _NUMBERS[kind]:
        if given.get(key) is not None:
            rope[key] = _number(given[key], key, file)
        elif kind == "llama3":
            raise CheckpointError(f"rope type 'llama3' needs {key!r}", file=file)
    if kind == "llama3":
        if rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise CheckpointError("rope's high_freq_factor must be above its low_freq_factor", file=file)
        return rope, max_positions
    if isinstance(given.get("truncate"), bool):
        rope["truncate"] = given["truncate"]
    # yarn's files name the length either before or after scaling; linear's and dynamic's name it before.
    return rope, max(max_positions, int(original * rope["factor"]))


def _number(value: Any, key: str, file: Path, least: float = 0.0) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12
    if not fine or not math.isfinite(value) or value < least or value <= 0:
        bound = f"of {least:g} or more" if least else "above 0"
        raise CheckpointError(f"rope's {key} is {value!r}; it must be a number {bound}", file=file)
    return float(value)


def _count(value: Any, key: str, file: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value < 2**31:
        raise CheckpointError(f"rope's {key} is {value!r}; it must be a number of tokens", file=file)
    return int(value)


def _factors(values: Any, head_size: int, file: Path) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != head_size // 2:
        raise CheckpointError(f"rope's factors are not {head_size // 2} numbers, half a head's size", file=file)
    return tuple(_number(value, "factors", file) for value in values)
