"""Which form a checkpoint is kept in whose weights are quantised already, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_shapes import CPU_SETTINGS, GB, cpu, make_spec

from loadstone.checkpoint.coding import Coding, Quantized
from loadstone.checkpoint.spec import ModelSpec
from loadstone.config import LoadConfig
from loadstone.errors import ResourceError
from loadstone.planner import Plan, plan
from loadstone.planner.own import kind_of, own_strategy
from loadstone.quantization import find_strategy

NF4 = Coding("nf4", "bitsandbytes-nf4", 4, 64)
ROWS = Coding("int8", "bitsandbytes-int8", 8)
WORDS = Coding("grouped", "awq", 4, 128)
FP8 = Coding("other", "fp8", 8, block=(128, 128))
SUMMARY = "a method, 4 bits"


def quantized(coding: Coding, *, but: tuple[str, ...] = ()) -> ModelSpec:
    """Return a spec with all matrices of the layers coded, but those whose names hold one of `but`."""
    spec = make_spec(layers=2, hidden=512, heads=8, kv_heads=2, inner=1024, vocab=1000)
    tensors = {
        name: replace(tensor, coding=coding)
        if spec.part_of(name) == "linear" and not any(one in name for one in but)
        else tensor
        for name, tensor in spec.tensors.items()
    }
    return replace(spec, tensors=tensors, quantized=Quantized("method", "a method", coding.bits))


def planned(spec: ModelSpec, *, free: int = 8 * GB, **said: Any) -> Plan:
    wish = LoadConfig(base_model="m", **said)
    return plan(wish, spec, cpu(free), CPU_SETTINGS, runtime_bytes=0, resident_bytes=0)


@pytest.mark.parametrize(("coding", "strategy"), [(NF4, "4bit"), (ROWS, "8bit"), (WORDS, "int4"), (FP8, "8bit")])
def test_what_nobody_asked_otherwise_stays_in_its_own_form(coding: Coding, strategy: str) -> None:
    spec = quantized(coding)
    assert own_strategy(spec) == strategy
    found = planned(spec)
    assert found.strategy == strategy
    assert any("the form of the checkpoint (a method" in reason for reason in found.reasons)


@pytest.mark.parametrize("coding", [NF4, ROWS, WORDS, FP8])
@pytest.mark.parametrize("asked", ["none", "8bit", "nf4"])
def test_who_asks_for_a_form_has_it(coding: Coding, asked: str) -> None:
    found = planned(quantized(coding), quantization=asked)
    assert found.strategy == find_strategy(asked).name
    assert any("as asked" in reason and "a method" in reason for reason in found.reasons)


@pytest.mark.parametrize(("coding", "strategy"), [(WORDS, "int4"), (NF4, "4bit"), (ROWS, "4bit"), (FP8, "4bit")])
def test_four_bits_are_met_by_whatever_has_four(coding: Coding, strategy: str) -> None:
    """Who means NF4 says so; of 8 bits they are made."""
    assert planned(quantized(coding), quantization="4bit").strategy == strategy


def test_auto_is_the_form_that_there_is_and_no_larger_one() -> None:
    assert planned(quantized(NF4), quantization="auto").strategy == "4bit"
    assert planned(quantized(FP8), quantization="auto").strategy == "8bit"


@pytest.mark.parametrize("said", [{}, {"quantization": "auto"}])
def test_what_does_not_fit_in_its_form_goes_into_a_smaller_one(said: dict[str, str]) -> None:
    spec = quantized(FP8)
    needed = planned(spec, context=512).needed_bytes
    found = planned(spec, free=needed - 1, context=512, **said)
    assert found.strategy == "4bit"
    assert any("8bit, the form of the checkpoint, does not fit" in reason for reason in found.reasons)


def test_what_fits_in_no_form_is_refused() -> None:
    with pytest.raises(ResourceError, match="does not fit"):
        planned(quantized(NF4), free=1_000_000)


def test_a_plain_checkpoint_has_no_form_of_its_own() -> None:
    spec = make_spec(layers=1, hidden=512, heads=8, kv_heads=2, inner=1024, vocab=1000)
    assert own_strategy(spec) is None
    assert planned(spec).strategy == "4bit"


@pytest.mark.parametrize(
    ("but", "name", "kind"),
    [
        (("mlp.down",), "mlp.down_proj", "lm_head"),
        (("mlp.down",), "mlp.up_proj", "linear"),
        (("k_proj",), "self_attn.q_proj", "lm_head"),
        (("gate_proj",), "mlp.up_proj", "lm_head"),
        (("gate_proj",), "self_attn.o_proj", "linear"),
    ],
)
def test_what_was_left_out_is_kept_with_care_and_so_is_what_is_multiplied_with_it(
    but: tuple[str, ...], name: str, kind: str
) -> None:
    spec = quantized(NF4, but=but)
    assert kind_of(spec, find_strategy("4bit"), f"model.layers.0.{name}.weight") == kind


def test_where_another_form_was_asked_for_all_layers_have_it() -> None:
    spec = quantized(FP8, but=("mlp.down",))
    assert kind_of(spec, find_strategy("4bit"), "model.layers.0.mlp.down_proj.weight") == "linear"


@pytest.mark.parametrize(("bits", "strategy"), [(4, "4bit"), (5, "8bit"), (8, "8bit")])
def test_blocks_of_gguf_with_more_than_4_bits_go_into_8(bits: int, strategy: str) -> None:
    spec = make_spec(layers=1, hidden=512, heads=8, kv_heads=2, inner=1024, vocab=1000)
    spec = replace(spec, format="gguf", quantized=Quantized("gguf", f"GGUF Q{bits}", bits))
    assert planned(spec).strategy == strategy
    assert planned(spec, quantization="4bit").strategy == "4bit"
    assert kind_of(spec, find_strategy(strategy), "model.layers.0.mlp.down_proj.weight") == "linear"
