"""A model's files become a spec that agrees with transformers, or an error that names file and cause."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import Folder, random_tensors, tiny_config

from loadstone import telemetry
from loadstone.checkpoint import inspect, known_architectures, open_weights, register_architecture
from loadstone.checkpoint.architectures import ARCHITECTURES, Architecture
from loadstone.checkpoint.config_json import architecture_of, sizes_of
from loadstone.checkpoint.rope import rope_settings
from loadstone.errors import CheckpointError
from loadstone.sources.base import ModelFiles

FILE = Path("config.json")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


@pytest.fixture
def events():
    seen: list[telemetry.Event] = []
    unsubscribe = telemetry.subscribe(seen.append)
    yield seen
    unsubscribe()


def sizes(config: dict[str, Any]):
    return sizes_of(config, architecture_of(config, FILE), FILE)


def refused(folder: Folder, says: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        inspect(folder.files())
    return caught.value


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves_is_inspected_as_transformers_means_it(tmp_path, model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=50, max_position_embeddings=256, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    spec = inspect(ModelFiles("m", tmp_path, tuple(tmp_path.glob("*.safetensors")), "test"))
    state = model.state_dict()
    assert set(spec.tensors) == set(state)
    assert spec.parameters == sum(tensor.numel() for tensor in state.values())
    assert spec.rope["rope_theta"] == config.rope_parameters["rope_theta"]
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.norm_epsilon == config.rms_norm_eps
    assert spec.sliding_window == getattr(config, "sliding_window", None)
    with open_weights(spec) as weights:
        for name, tensor in state.items():
            assert torch.equal(weights.tensor(name), tensor)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_make_one_model(folder, shards):
    config = tiny_config()
    tensors = random_tensors(config)
    spec = inspect(folder.write(config, tensors, shards=shards).files())
    assert len({tensor.file for tensor in spec.tensors.values()}) == shards
    with open_weights(spec) as weights:
        assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_shard_behind_a_link_is_read(folder, tmp_path):
    folder.write(tiny_config(), shards=2)
    shard = sorted(folder.path.glob("*.safetensors"))[0]
    elsewhere = tmp_path / "blob"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    assert inspect(folder.files()).layers == 2


def test_parts_are_told_apart(folder):
    spec = inspect(folder.write(tiny_config()).files())
    assert spec.part_of("model.embed_tokens.weight") == "embedding"
    assert spec.part_of("lm_head.weight") == "lm_head"
    assert spec.part_of("model.layers.0.mlp.up_proj.weight") == "linear"
    assert spec.part_of("model.layers.0.self_attn.q_proj.bias") == "norm"
    assert spec.part_of("model.norm.weight") == "norm"


# --- the index


def test_an_index_that_points_outside_its_folder_is_refused(folder):
    folder.write(tiny_config(), shards=2)
    index = json.loads((folder.path / "model.safetensors.index.json").read_text())
    folder.write_index({**index["weight_map"], "lm_head.weight": "../../x"})
    assert "points outside its folder, to '../../x'" in str(refused(folder, "index.json"))


def test_a_missing_shard_is_named(folder):
    folder.write(tiny_config(), shards=2)
    (folder.path / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "shard 'model-00002-of-00002.safetensors' is missing")


def test_a_tensor_that_the_index_promises_is_named_when_absent(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    folder.write(config, tensors, shards=2)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder.path / "model-00002-of-00002.safetensors")
    assert "00002-of-00002" in str(refused(folder, "which model.safetensors.index.json says is in it"))


def test_an_index_of_other_files_is_ignored(folder):
    folder.write(tiny_config())
    folder.write_index({"lm_head.weight": "model-00001-of-00002.safetensors"})
    assert inspect(folder.files()).layers == 2


def test_an_index_that_maps_nothing_is_refused(folder):
    folder.write(tiny_config(), shards=2)
    (folder.path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    refused(folder, "weight_map does not map tensors to files")


def test_one_tensor_in_two_shards_without_an_index_is_refused(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    folder.write(config, tensors)
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder.path / "more.safetensors")
    refused(folder, "tensor 'lm_head.weight' is in model.safetensors too")


# --- tensors


def test_a_missing_tensor_is_named(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder.write(config, tensors)
    refused(folder, "tensor 'model.layers.1.mlp.up_proj.weight' is missing")


def test_a_wrong_shape_is_named_with_the_wanted_one(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(512, 128)
    folder.write(config, tensors)
    error = refused(folder, "'model.layers.1.mlp.up_proj.weight' has shape [512, 128]; its sizes ask for [512, 256]")
    assert "model.safetensors" in str(error)


def test_a_type_that_is_not_read_is_named(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    folder.write(config, tensors)
    refused(folder, "'model.norm.weight' is of type F64; read are BF16, F16, F32")


def test_a_truncated_shard_is_named_with_the_bytes_missing(folder):
    folder.write(tiny_config(), shards=2)
    shard = folder.path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 77)
    assert str(shard) in str(refused(folder, "77 are missing"))


def test_a_head_without_weights_of_its_own_needs_tied_embeddings(folder):
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors["lm_head.weight"]
    folder.write(config, tensors)
    assert "tie_word_embeddings" in str(refused(folder, "'lm_head.weight' is missing"))
    folder.write({**config, "tie_word_embeddings": True}, tensors)
    assert inspect(folder.files()).tied_embeddings


def test_a_tied_heads_own_weights_are_left_out_in_silence(folder, events):
    folder.write(tiny_config(tie_word_embeddings=True), random_tensors(tiny_config()))
    assert "lm_head.weight" not in inspect(folder.files()).tensors
    assert not events


def test_unknown_tensors_are_left_out_with_a_warning_and_known_buffers_without(folder, events):
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    folder.write(config, tensors)
    inspect(folder.files())
    assert not events
    folder.write(config, {**tensors, "visual.patch.weight": torch.zeros(4)})
    inspect(folder.files())
    assert [event.name for event in events] == ["checkpoint.warning"]
    assert events[0].fields["tensors"] == ["visual.patch.weight"]


def test_no_weights_at_all_is_an_error(folder):
    folder.write(tiny_config())
    (folder.path / "model.safetensors").unlink()
    refused(folder, "there are no weights")


# --- config.json


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[1]", "a JSON list, not an object"), ("\ud800", "not valid JSON"),
     ("[" * 200_000, "not valid JSON")],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(folder, text, says):
    folder.write(tiny_config())
    (folder.path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in str(refused(folder, says))


def test_a_missing_config_is_named(folder):
    folder.write(tiny_config())
    (folder.path / "config.json").unlink()
    assert "config.json" in str(refused(folder, "it is missing"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "bert"}, "architecture 'bert' is not known; known are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "'model_type' is missing; known are llama"),
        ({"model_type": ["llama"]}, "is not known"),
        ({"hidden_size": None, "vocab_size": None}, "hidden_size, vocab_size missing"),
        ({"hidden_size": "256"}, "hidden_size is '256'; it must be a whole number"),
        ({"hidden_size": 256.0}, "hidden_size is 256.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 63}, "63, is odd"),
        ({"head_dim": None, "hidden_size": 258}, "258 is not a multiple of num_attention_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not known; known is silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"bos_token_id": -3}, "bos_token_id is -3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: bits is None; read are 4, 8"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not known; known are default"),
        ({"rope_scaling": [1]}, "rope settings [1] are not an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope's factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope's factor is 0.5"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "needs 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "from layer to layer"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "each of the 2 layers"),
        ({"use_sliding_window": True, "layer_types": [["x"], "y"]}, "each of the 2 layers"),
        ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers is -1"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_meant_is_refused(folder, changes, says):
    folder.write(tiny_config(), random_tensors(tiny_config()))
    (folder.path / "config.json").write_text(json.dumps({**tiny_config(), **changes}))
    assert "config.json" in str(refused(folder, says))


_values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*tiny_config(), "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
             "layer_types", "quantization_config", "max_window_layers", "attention_bias", "mlp_bias"]
        ),
        _values, min_size=1, max_size=4,
    )
)  # fmt: skip
def test_any_config_is_either_read_or_refused(changes):
    config = {**tiny_config(), **changes}
    try:
        sizes(config)
    except CheckpointError:
        return


def test_remote_code_in_a_config_is_not_looked_at(folder):
    config = tiny_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    folder.write(config)
    (folder.path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    assert inspect(folder.files()).layers == 2


def test_absent_keys_mean_what_they_mean_to_the_architecture():
    config = tiny_config("llama")
    for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del config[key]
    found = sizes(config)
    assert (found.head_size, found.kv_heads, found.norm_epsilon) == (64, 4, 1e-6)
    assert found.rope == {"rope_theta": 10_000.0, "rope_type": "default"}
    assert not found.tied_embeddings
    del (qwen3 := tiny_config("qwen3"))["head_dim"]
    assert sizes(qwen3).head_size == 128


@pytest.mark.parametrize(
    ("model_type", "attention_bias", "expected"),
    [("llama", False, (False, False)), ("llama", True, (True, True)), ("qwen2", False, (True, False)),
     ("mistral", True, (False, False)), ("qwen3", True, (True, True))],
)  # fmt: skip
def test_biases_follow_the_architecture(model_type, attention_bias, expected):
    found = sizes(tiny_config(model_type, attention_bias=attention_bias))
    assert (found.qkv_bias, found.output_bias) == expected


# --- tokens that end an answer, and generation_config.json


def test_ends_are_the_union_of_both_files(folder):
    folder.write(tiny_config(eos_token_id=[2, 7]))
    (folder.path / "generation_config.json").write_text('{"eos_token_id": [9, 7], "top_p": 0.8}')
    spec = inspect(folder.files())
    assert spec.eos_token_ids == (9, 7, 2)
    assert spec.bos_token_id == 1
    assert spec.generation["top_p"] == 0.8


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}'])
def test_a_bad_generation_config_does_not_stop_the_model(folder, events, text):
    folder.write(tiny_config())
    (folder.path / "generation_config.json").write_text(text)
    assert inspect(folder.files()).eos_token_ids == (2,)
    assert [event.name for event in events] == ["checkpoint.warning"]


# --- windows


@pytest.mark.parametrize(
    ("model_type", "changes", "window", "layers"),
    [
        ("llama", {"sliding_window": 64}, None, (False, False)),
        ("mistral", {"sliding_window": 64}, 64, (True, True)),
        ("mistral", {"sliding_window": None}, None, (False, False)),
        ("mistral", {}, 4096, (True, True)),
        ("qwen2", {"sliding_window": 64, "max_window_layers": 0}, None, (False, False)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64,
         (False, True)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, None, (False, False)),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True,
                   "layer_types": ["sliding_attention", "full_attention"]}, 64, (True, False)),
    ],
)  # fmt: skip
def test_windows_follow_the_architectures_rule(model_type, changes, window, layers):
    found = sizes(tiny_config(model_type, **changes))
    assert (found.sliding_window, found.windowed_layers) == (window, layers)


# --- positions


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected", "longest"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10_000.0}, 1024),
        ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}, 1024),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 8.0},
            {"rope_type": "default", "rope_theta": 7.0}, 1024,
        ),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}, 2048,
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4}},
            {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0,
             "original_max_position_embeddings": 1024}, 4096,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
             "original_max_position_embeddings": 512}, 2048,
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 256, "beta_fast": 16,
                              "truncate": False}},
            {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "beta_fast": 16.0,
             "original_max_position_embeddings": 256, "truncate": False}, 1024,
        ),
        (
            {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
            {**LLAMA3, "rope_theta": 500_000.0}, 1024,
        ),
    ],
)  # fmt: skip
def test_rope_settings_old_and_new_become_one_mapping(config, expected, longest):
    assert rope_settings(config, 1024, 64, FILE) == (expected, longest)


# --- architectures


def test_a_registered_architecture_is_known_and_inspected(folder):
    register_architecture(Architecture("tinyqwen", qkv_bias=True))
    try:
        assert "tinyqwen" in known_architectures()
        config = tiny_config("tinyqwen")
        assert inspect(folder.write(config).files()).qkv_bias
    finally:
        del ARCHITECTURES._things["tinyqwen"]
