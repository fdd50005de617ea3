"""Tables of angles are those that transformers computes from the same config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loadstone.checkpoint.rope import rope_settings
from loadstone.errors import CheckpointError
from loadstone.model.rope import rope_tables, rotate

CPU = torch.device("cpu")
TRAINED = 2048


def tables(rope: dict[str, Any], head_size: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(rope, head_size, positions, CPU, torch.float32)


def assert_as_transformers(parameters: dict[str, Any], head_size: int, positions: int, trained: int = TRAINED) -> None:
    config = transformers.LlamaConfig(
        hidden_size=4 * head_size, num_attention_heads=4, head_dim=head_size, max_position_embeddings=trained,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    frequencies, sharpness = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=positions)
    angles = torch.outer(torch.arange(positions).float(), frequencies)
    ours, _ = rope_settings({"rope_parameters": parameters}, trained, head_size, Path("config.json"))
    cosines, sines = tables(ours, head_size, positions)
    assert cosines.shape == sines.shape == (positions, head_size // 2)
    # An angle of thousands of radians, as float32, is known to some 1e-4 only.
    torch.testing.assert_close(cosines, angles.cos() * sharpness, rtol=0, atol=1e-3)
    torch.testing.assert_close(sines, angles.sin() * sharpness, rtol=0, atol=1e-3)


thetas = st.sampled_from([10_000.0, 500_000.0, 1_000_000.0])
head_sizes = st.sampled_from([32, 64, 80, 128])
factors = st.floats(1.0, 32.0)


@given(theta=thetas, head_size=head_sizes, factor=factors)
@settings(max_examples=15, deadline=None)
def test_linear(theta: float, head_size: int, factor: float) -> None:
    assert_as_transformers({"rope_type": "linear", "rope_theta": theta, "factor": factor}, head_size, 1500)


@given(theta=thetas, head_size=head_sizes, factor=factors, low=st.floats(0.5, 2), wider=st.floats(0.5, 8))
@settings(max_examples=15, deadline=None)
def test_llama3(theta: float, head_size: int, factor: float, low: float, wider: float) -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": low + wider, "original_max_position_embeddings": 512,
    }  # fmt: skip
    assert_as_transformers(parameters, head_size, 1500)


@given(
    theta=thetas, head_size=head_sizes, factor=factors, fast=st.none() | st.floats(8, 64),
    slow=st.none() | st.floats(0.5, 4), truncate=st.none() | st.booleans(), trained=st.sampled_from([64, 512, 4096]),
    sharp=st.sampled_from([{}, {"attention_factor": 1.3}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"mscale": 0.7}]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_yarn(
    theta: float, head_size: int, factor: float, fast: float | None, slow: float | None, truncate: bool | None,
    trained: int, sharp: dict[str, float],
) -> None:  # fmt: skip
    optional = {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    parameters = {
        "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": trained,
        **sharp, **{key: value for key, value in optional.items() if value is not None},
    }  # fmt: skip
    assert_as_transformers(parameters, head_size, 1500)


@given(theta=thetas, head_size=head_sizes, factor=factors, positions=st.sampled_from([100, 512, 513, 1500]))
@settings(max_examples=20, deadline=None)
def test_dynamic_is_made_for_the_whole_context(theta: float, head_size: int, factor: float, positions: int) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    assert_as_transformers(parameters, head_size, positions, trained=512)


def test_factors_of_a_gguf_file_give_the_angles_of_llama3() -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    }  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=dict(llama3))
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, CPU)
    plain = 1 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    rope = {"rope_type": "factors", "rope_theta": 500_000.0, "factors": tuple((plain / stretched).tolist())}
    for found, wanted in zip(tables(rope, 64, 1000), tables(llama3, 64, 1000), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_an_unknown_kind_of_positions_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'spiral' is not known; known are default, .*yarn"):
        tables({"rope_type": "spiral", "rope_theta": 1e4}, 64, 8)


def test_positions_far_out_keep_their_precision() -> None:
    cosines, _ = tables({"rope_type": "default", "rope_theta": 1e6}, 128, 131_072)
    exact = torch.outer(torch.arange(131_000, 131_072).double(), 1e6 ** -(torch.arange(0, 128, 2).double() / 128))
    torch.testing.assert_close(cosines[131_000:].double(), exact.cos(), rtol=0, atol=2e-2)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    cosines, sines = tables({"rope_type": "default", "rope_theta": 1e4}, 32, 64)
    query, key = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(1))

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x, cosines[position], sines[position]).flatten()

    assert turned(query, 50).norm().item() == pytest.approx(query.norm().item(), rel=1e-5)
    near, far = turned(query, 9) @ turned(key, 4), turned(query, 55) @ turned(key, 50)
    assert near.item() == pytest.approx(far.item(), abs=1e-4)
