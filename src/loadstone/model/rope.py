"""Rotary position embeddings (Su et al. 2021) and the ways in which checkpoints stretch them.

`linear` divides positions (Chen et al. 2023); `dynamic` enlarges theta for a context beyond the trained one (NTK);
`llama3` divides low frequencies only (Llama 3.1's config); `yarn` blends both by wavelength and sharpens attention
(Peng et al. 2023). Factors given outright (GGUF's rope_freqs) divide frequency by frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from loadstone.errors import CheckpointError


def rope_tables(
    rope: Mapping[str, Any], head_size: int, positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, each positions × head_size/2, for positions from 0 on."""
    kind = str(rope.get("rope_type", "default"))
    if kind not in _FREQUENCIES:
        raise CheckpointError(f"rope type {kind!r} is not known; known are {', '.join(_FREQUENCIES)}")
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = 1.0 / float(rope["rope_theta"]) ** exponents
    frequencies, sharpness = _FREQUENCIES[kind](frequencies, rope, positions)
    if (factors := rope.get("factors")) is not None:
        frequencies = frequencies / torch.as_tensor(factors, dtype=torch.float32)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return (angles.cos() * sharpness).to(device, dtype), (angles.sin() * sharpness).to(device, dtype)


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return x (N × heads × head_size) turned by the angles of its tokens (cosines and sines N × 1 × head_size/2)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty_like(x)
    torch.mul(first, cosines, out=turned[..., :half]).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=turned[..., half:]).addcmul_(first, sines)
    return turned


def _default(frequencies: torch.Tensor, rope: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: torch.Tensor, rope: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    return frequencies / float(rope["factor"]), 1.0


def _dynamic(frequencies: torch.Tensor, rope: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    trained = int(rope["original_max_position_embeddings"])
    if positions <= trained:
        return frequencies, 1.0
    # The stretch should grow with each text, but keys that are in the cache are already turned: it is the one that
    # the longest text needs, for all.
    factor, half = float(rope["factor"]), len(frequencies)
    grown = factor * positions / trained - (factor - 1)
    exponents = torch.arange(half, dtype=torch.float32) / max(half - 1, 1)
    return frequencies / grown**exponents, 1.0


def _llama3(frequencies: torch.Tensor, rope: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = trained * frequencies / (2 * math.pi)  # over the trained context
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (blend + (1 - blend) / factor), 1.0


def _yarn(frequencies: torch.Tensor, rope: Mapping[str, Any], positions: int) -> tuple[torch.Tensor, float]:
    factor, theta = float(rope["factor"]), float(rope["rope_theta"])
    trained = int(rope.get("original_max_position_embeddings") or rope["max_position_embeddings"])
    half = len(frequencies)

    def dimension(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return frequencies * (ramp / factor + 1 - ramp), _yarn_sharpness(rope, factor)


def _yarn_sharpness(rope: Mapping[str, Any], factor: float) -> float:
    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(float(rope["mscale"])) / scale(float(rope["mscale_all_dim"]))
    return scale(1.0)


_FREQUENCIES = {
    "default": _default,
    "factors": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
