"""Claims about sampling: ranges, layers, and what a checkpoint says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.config import GenerationConfig, Sampling, generation_from_checkpoint, resolve_generation
from loadstone.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.7"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", 5),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        GenerationConfig(**{name: value})  # type: ignore[arg-type]
    assert caught.value.key == name


def test_stop_may_be_one_text_or_a_list() -> None:
    assert GenerationConfig(stop="x").stop == ("x",)  # type: ignore[arg-type]
    assert GenerationConfig(stop=["x", "停"]).stop == ("x", "停")  # type: ignore[arg-type]
    assert GenerationConfig(stop=[]).stop == ()  # type: ignore[arg-type]


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    sampling, _ = resolve_generation([("call", GenerationConfig(temperature=1e-30))])
    assert sampling.greedy


def test_nobody_saying_anything_gives_the_defaults() -> None:
    sampling, origins = resolve_generation([])
    assert sampling == Sampling()
    assert sampling.greedy
    assert set(origins.values()) == {"default"}
    assert set(origins) == set(Sampling.__dataclass_fields__)


def test_later_layers_win_field_by_field_and_origins_tell() -> None:
    sampling, origins = resolve_generation(
        [
            ("generation_config.json", GenerationConfig(temperature=0.7, top_p=0.8)),
            ("loadstone.yaml:2", GenerationConfig(top_p=0.9, stop=("x",))),
            ("call", GenerationConfig(temperature=0, stop=())),
        ]
    )
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (0, 0.9, ())
    assert sampling.greedy
    assert origins["temperature"] == origins["stop"] == "call"
    assert origins["top_p"] == "loadstone.yaml:2"
    assert origins["seed"] == "default"


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, GenerationConfig(temperature=0.7, top_k=20)),
        ({"temperature": 1}, GenerationConfig(temperature=1.0)),
        ({"do_sample": False, "temperature": 0.7}, GenerationConfig(temperature=0.0)),
        ({"eos_token_id": [1, 2], "transformers_version": "4.37.0"}, GenerationConfig()),
        ({"temperature": "hot", "top_p": 0, "top_k": -1, "seed": None}, GenerationConfig()),
        ({"temperature": -1, "top_p": 0.9}, GenerationConfig(top_p=0.9)),
        ({"stop_strings": ["END"]}, GenerationConfig(stop=("END",))),
        ([], GenerationConfig()),
    ],
)
def test_a_checkpoint_says_what_can_be_meant_and_no_more(mapping: object, said: GenerationConfig) -> None:
    assert generation_from_checkpoint(mapping) == said  # type: ignore[arg-type]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab停 ", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GenerationConfig.model_fields, "do_sample", "stop_strings"]), _json))
def test_no_checkpoint_file_can_break_it(mapping: dict[str, object]) -> None:
    """Whatever the file says, the result resolves to values in their ranges."""
    sampling, _ = resolve_generation([("checkpoint", generation_from_checkpoint(mapping))])
    assert sampling.temperature >= 0
    assert 0 < sampling.top_p <= 1
    assert all(sampling.stop)
