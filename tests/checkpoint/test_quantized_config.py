"""What config.json says of a checkpoint that is quantised already, and what is not read of it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.quantized_checkpoints import FORMATS
from tiny_models import Folder, tiny_config

from loadstone.checkpoint import inspect
from loadstone.checkpoint.quantized import method_of
from loadstone.errors import CheckpointError

FILE = Path("config.json")
_COMPRESSED = FORMATS["compressed-tensors W4A16"]().config
_NF4 = FORMATS["bitsandbytes NF4"]().config
_GPTQ = FORMATS["GPTQ"]().config
_FP8 = FORMATS["FP8, blocks of 128 × 128"]().config


def weights(**changes: Any) -> dict[str, Any]:
    """compressed-tensors' settings with some of those of the weights changed."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel", **changes}}
    return {**_COMPRESSED, "config_groups": {"group_0": group}}


SUMMARIES = {
    "bitsandbytes NF4": "bitsandbytes NF4, 4 bits, groups of 64",
    "bitsandbytes FP4": "bitsandbytes FP4, 4 bits, groups of 64",
    "bitsandbytes 8 bits": "bitsandbytes, 8 bits, one scale a row",
    "AWQ": "AWQ, 4 bits, groups of 128, with zero points",
    "AWQ, one group a row": "AWQ, 4 bits, one scale a row, with zero points",
    "GPTQ": "GPTQ, 4 bits, groups of 128",
    "GPTQ, groups of 32, act-order": "GPTQ, 4 bits, groups of 32, act-order",
    "GPTQ, 8 bits": "GPTQ, 8 bits, groups of 128",
    "compressed-tensors W4A16, groups of 32, not symmetric": (
        "compressed-tensors W4, 4 bits, groups of 32, with zero points"
    ),
    "compressed-tensors W4A16, act-order": "compressed-tensors W4, 4 bits, groups of 64, act-order",
    "compressed-tensors W8A16": "compressed-tensors W8, 8 bits, one scale a row",
    "compressed-tensors FP8": "compressed-tensors FP8, 8 bits, one scale a row",
    "FP8, blocks of 128 × 128": "FP8 (E4M3), 8 bits, one scale a block of 128 × 128",
    "FP8, one scale": "FP8 (E4M3), 8 bits",
}  # fmt: skip


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_person_is_told_in_a_few_words(name: str) -> None:
    method = method_of({"quantization_config": dict(FORMATS[name]().config)}, FILE)
    assert method is not None
    assert method.about.summary == SUMMARIES[name]


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ({**_NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.3"]}, ("lm_head", "model.layers.3")),
        ({**_FP8, "modules_to_not_convert": ["lm_head"]}, ("lm_head",)),
        (_COMPRESSED, ("lm_head",)),
        ({**_GPTQ, "modules_to_not_convert": None}, ()),
    ],
)  # fmt: skip
def test_modules_that_were_left_out_are_told(said: dict[str, Any], key: tuple[str, ...]) -> None:
    method = method_of({"quantization_config": said}, FILE)
    assert method is not None
    assert method.about.left_out == key


@pytest.mark.parametrize("said", [None, {}, False])
def test_a_checkpoint_that_says_nothing_is_not_quantised(said: object) -> None:
    assert method_of({"quantization_config": said}, FILE) is None


def test_settings_without_a_quantised_weight_mean_nothing(tmp_path: Path) -> None:
    """Some checkpoints that were made whole again still have them."""
    folder = Folder(tmp_path / "model").write({**tiny_config(), "quantization_config": dict(_GPTQ)})
    assert inspect(folder.files()).quantized is None


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"quant_method": "aqlm"}, "quantised by 'aqlm', which is not read; read are bitsandbytes, awq, gptq"),
        ({"quant_method": ["gptq"]}, "quantised by ['gptq'], which is not read"),
        ({}, None),
        ([1], "quantised by None, which is not read"),
        ("gptq", "quantised by None, which is not read"),
        ({"quant_method": "bitsandbytes"}, "either load_in_4bit or load_in_8bit"),
        ({**_NF4, "load_in_8bit": True}, "either load_in_4bit or load_in_8bit"),
        ({**_NF4, "load_in_4bit": "yes"}, "load_in_4bit is 'yes'; it must be true or false"),
        ({**_NF4, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'; read are nf4, fp4"),
        ({**_NF4, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is not a list of names"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'; read are gemm"),
        ({"quant_method": "awq", "bits": 3}, "bits is 3; read are 4"),
        ({**_GPTQ, "bits": True}, "bits is True; read are 4, 8"),
        ({**_GPTQ, "bits": 2}, "bits is 2; read are 4, 8"),
        ({**_GPTQ, "group_size": -128}, "group_size is -128; it must be -1 or a multiple of 8"),
        ({**_GPTQ, "group_size": 1e9}, "group_size is 1000000000.0"),
        ({**_GPTQ, "group_size": 12}, "group_size is 12"),
        ({**_GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; read are gptq, gptq_v2"),
        ({**_GPTQ, "dynamic": {"-:.*down.*": {}}}, "dynamic: settings that differ from module to module"),
        ({**_FP8, "fmt": "e5m2"}, "fmt is 'e5m2'; read are e4m3"),
        ({**_FP8, "weight_block_size": [128]}, "the size of a block is [128]"),
        ({**_FP8, "weight_block_size": [-128, 128]}, "the size of a block is [-128, 128]"),
        ({**_COMPRESSED, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; read are pack-"),
        ({**_COMPRESSED, "quantization_status": "initialized"}, "quantization_status is 'initialized'"),
        ({**_COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not read"),
        ({**_COMPRESSED, "config_groups": {}}, "config_groups is missing or empty"),
        ({**_COMPRESSED, "config_groups": {"group_0": 4}}, "config_groups.group_0 says nothing of weights"),
        (weights(num_bits=3), "config_groups.group_0.weights: num_bits is 3; read are 4, 8"),
        (weights(type="float"), "floats of 4 bits are not read"),
        (weights(strategy="tensor_group"), "strategy is 'tensor_group'"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(said: Any, says: str | None) -> None:
    if says is None:
        assert method_of({"quantization_config": said}, FILE) is None
        return
    with pytest.raises(CheckpointError, match=re.escape(says)) as caught:
        method_of({"quantization_config": said}, FILE)
    assert "config.json" in str(caught.value)
    assert caught.value.hint


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@given(st.sampled_from([dict(FORMATS[name]().config) for name in SUMMARIES]), st.data())
def test_whatever_a_setting_is_it_is_read_or_refused(said: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(said)))
    changed = {**said, key: data.draw(_json)}
    with suppress(CheckpointError):
        method = method_of({"quantization_config": json.loads(json.dumps(changed))}, FILE)
        assert method is None or method.about.summary
