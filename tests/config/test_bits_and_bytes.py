"""`quantization` as a mapping: the fields of transformers' BitsAndBytesConfig, and what is done of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadstone.config import ConfigManager
from loadstone.config.bits_and_bytes import BitsAndBytes
from loadstone.errors import ConfigurationError


def wish_of(quantization: object) -> Any:
    return ConfigManager({"model_config": {"quantization": quantization}}).config.model


def differences_of(kind: str, **fields: object) -> tuple[str, ...]:
    return BitsAndBytes(**fields).differences(kind)


@pytest.mark.parametrize(
    ("mapping", "strategy"),
    [({"load_in_4bit": True}, "4bit"), ({"load_in_8bit": True}, "8bit"), ({}, "none"),
     ({"load_in_4bit": True, "quant_method": "bitsandbytes", "_load_in_4bit": True}, "4bit")],
)  # fmt: skip
def test_the_strategy_is_the_one_that_is_switched_on(mapping: dict[str, object], strategy: str) -> None:
    assert wish_of(mapping).strategy == strategy


def test_a_strategys_name_stays_one() -> None:
    assert (wish_of("nf4").quantization, wish_of("nf4").strategy) == ("nf4", "nf4")


def test_transformers_own_configuration_is_read() -> None:
    from transformers import BitsAndBytesConfig

    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    )
    asked = wish_of(theirs).quantization
    assert (asked.strategy, asked.bnb_4bit_quant_type, asked.bnb_4bit_compute_dtype, asked.llm_int8_skip_modules) == (
        "4bit", "nf4", "bfloat16", ("lm_head",),
    )  # fmt: skip


def test_a_mapping_in_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model_config:\n  quantization:\n    load_in_4bit: true\n    llm_int8_skip_modules: [lm_head]\n")
    assert ConfigManager(file).config.model.quantization.llm_int8_skip_modules == ("lm_head",)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"load_in_4bits": True}, "did you mean 'load_in_4bit'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both true"),
        ({"load_in_4bit": "yes"}, "load_in_4bit must be true or false"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"llm_int8_skip_modules": "lm_head"}, "is one name; write a list"),
        ({"quant_method": "awq"}, "only bitsandbytes"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold"),
        ([1], "not the name of a strategy"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(mapping: object, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        wish_of(mapping)
    assert "model_config.quantization" in str(caught.value)
    assert (caught.value.key or "").startswith("model_config.quantization")


def test_a_wrong_field_in_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model_config:\n  quantization:\n    load_in_4bit: 7\n")
    with pytest.raises(ConfigurationError) as caught:
        ConfigManager(file)
    assert (caught.value.file, caught.value.line) == (file, 2)


def test_what_a_device_can_do_as_asked_needs_no_words() -> None:
    assert differences_of("cuda", load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16") == ()


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("cuda", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "NF4 is kept"),
        ("cuda", {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}, "quantised to 8 bits all the same"),
        ("cpu", {"load_in_4bit": True}, "on cpu scales have 16 bits"),
        ("cpu", {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}, "on cpu products are float32"),
        ("cpu", {"load_in_8bit": True}, "activations keep 15 bits"),
        ("cuda", {"load_in_8bit": True}, "are rounded with their row"),
        ("cuda", {"bnb_4bit_quant_storage": "bfloat16"}, "codes are bytes"),
        ("cuda", {"llm_int8_enable_fp32_cpu_offload": True}, "a model is on one device"),
        ("cpu", {"llm_int8_has_fp16_weight": True}, "8 bits alone"),
    ],
)
def test_what_is_done_otherwise_is_said(kind: str, fields: dict[str, object], words: str) -> None:
    assert any(words in said for said in differences_of(kind, **fields))
