"""Matrices that somebody wants unquantised (`llm_int8_skip_modules`) stay so, in memory, plans and the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.small_model import write_small_model

from loadstone import ModelManager
from loadstone.checkpoint import inspect
from loadstone.planner import Plan
from loadstone.quantization.linear import DenseLinear
from loadstone.sources import resolve
from loadstone.telemetry import Event
from loadstone.testing import fake_device, fake_devices


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("left-alone") / "model")


def managed(model: Path, store: Path, **quantization: Any) -> ModelManager:
    wish = {"base_model": str(model), "quantization": {"load_in_4bit": True, **quantization}}
    return ModelManager({"model_config": wish, "store": {"folder": str(store)}})


def kept_whole(manager: ModelManager) -> set[str]:
    """Return which products of the first layer, and whether the head, are floats."""
    decoder = manager.load().decoder
    layer = decoder.layers[0]
    products = {name: getattr(layer, name).weight for name in ("query_key_value", "output", "gate_up", "down")}
    return {name for name, weight in {**products, "head": decoder.head}.items() if isinstance(weight, DenseLinear)}


@pytest.mark.parametrize(
    ("modules", "whole"),
    [
        ([], set()),
        (["lm_head"], {"head"}),
        (["down_proj", "lm_head"], {"down", "head"}),
        (["q_proj"], {"query_key_value"}),  # which is multiplied with k and v
        (["model.layers.0"], {"query_key_value", "output", "gate_up", "down"}),
        (["model.layers.1"], set()),
        (["down"], set()),  # no module is called that
    ],
)
def test_what_is_named_is_not_quantised(model: Path, tmp_path: Path, modules: list[str], whole: set[str]) -> None:
    with managed(model, tmp_path, llm_int8_skip_modules=modules) as manager:
        assert kept_whole(manager) == whole


def test_the_plan_counts_what_is_left_alone(model: Path, tmp_path: Path) -> None:
    with managed(model, tmp_path, llm_int8_skip_modules=["down_proj", "lm_head"]) as manager:
        loaded = manager.load()
        planned = dict(loaded.plan.weight_bytes)
        assert loaded.decoder.weight_bytes() == planned


def test_a_later_load_finds_the_same_in_the_store(model: Path, tmp_path: Path, events: list[Event]) -> None:
    texts = []
    for _ in range(2):
        with managed(model, tmp_path, llm_int8_skip_modules=["down_proj"]) as manager:
            assert kept_whole(manager) == {"down"}
            texts.append(str(manager.generate("abc", max_new_tokens=8, temperature=0)))
    assert texts[0] == texts[1]
    assert [event.name for event in events].count("store.made") == 1
    assert [event.name for event in events].count("store.hit") == 1


def test_the_store_keeps_what_is_kept_otherwise_apart(model: Path, tmp_path: Path) -> None:
    with managed(model, tmp_path, llm_int8_skip_modules=["down_proj"]) as first:
        assert kept_whole(first) == {"down"}

    def buffers(plan: Plan) -> int:
        return plan.load_peak_bytes - plan.runtime_bytes - sum(plan.weight_bytes.values())

    with managed(model, tmp_path) as second:
        assert buffers(second.plan()) > 0  # since its weights are to be made
        assert kept_whole(second) == set()
        second.load().decoder.settle()
        assert buffers(second.plan()) == 0
    assert len([*(tmp_path / "entries").iterdir()]) == 2


def test_a_tied_head_is_the_embedding() -> None:
    spec = inspect(resolve("smollm2")).leaving_alone(["lm_head"])
    assert spec.left_alone == {"model.embed_tokens.weight"}


def test_the_reasons_say_what_is_left_alone_and_what_is_no_module(model: Path, tmp_path: Path) -> None:
    reasons = managed(model, tmp_path, llm_int8_skip_modules=["lm_head", "vision_tower"]).plan().reasons
    assert "1 matrices are left as they are (llm_int8_skip_modules)" in reasons
    assert any("'vision_tower' is no matrix" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("asked", "capabilities", "made_in"),
    [
        (None, {"float16", "bfloat16"}, "bfloat16"),
        ("float16", {"float16", "bfloat16"}, "float16"),
        ("float32", {"float16"}, "float32"),
        ("bfloat16", {"float16"}, "float16"),  # the nearest that it can do
    ],
)
def test_a_gpu_makes_products_in_the_type_that_is_asked_for(
    asked: str | None, capabilities: set[str], made_in: str
) -> None:
    devices = fake_devices(fake_device("cuda", capabilities=capabilities))
    wish = {"base_model": "smollm2", "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": asked}}
    plan = ModelManager({"model_config": wish}, devices=devices).plan()
    assert plan.settings.compute_dtype == made_in
    assert asked in (None, made_in) or any(f"{asked} was asked for" in reason for reason in plan.reasons)
