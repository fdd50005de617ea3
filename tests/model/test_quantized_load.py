"""Checkpoints that are quantised already, all the way into a decoder: kept as they are, or nearest to it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.quantized_checkpoints import FORMATS, Checkpoint, gptq, nf4, quantize_folder

from loadstone.errors import ModelLoadError
from loadstone.model import Decoder, build
from loadstone.quantization.aten_int4 import AtenInt4Linear
from loadstone.quantization.int4_linear import Int4Linear, ReorderedLinear
from loadstone.quantization.kernels import cpu
from loadstone.quantization.linear import Int8Linear, Linear, Nf4Linear
from loadstone.sources import resolve
from loadstone.store import Store
from loadstone.store.known import FileState
from loadstone.telemetry import Event

CheckpointOf = Callable[[str], Checkpoint]
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
LEFT = "model.layers.{}.{}.weight"
PARTS = {
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
NF4 = [name for name in FORMATS if "NF4" in name and "32" not in name]
INT4 = [name for name in FORMATS if name.startswith(("AWQ", "GPTQ", "compressed-tensors W4")) and "8 bits" not in name]
INT8 = [
    "bitsandbytes 8 bits", "compressed-tensors W8A16", "compressed-tensors int8",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("plain"), "llama", torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def checkpoint_of(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointOf:
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            made[name] = quantize_folder(plain, tmp_path_factory.mktemp("quantized") / "model", FORMATS[name]())
        return made[name]

    return make


def products(decoder: Decoder) -> dict[str, tuple[Linear, tuple[str, ...]]]:
    """Return the products of all layers, and the names of the matrices in each."""
    return {
        f"{index}.{part}": (getattr(layer, part).weight, tuple(LEFT.format(index, one) for one in names))
        for index, layer in enumerate(decoder.layers)
        for part, names in PARTS.items()
    }


def whole(linear: Linear) -> torch.Tensor:
    return linear.dequantize(0, linear.rows, torch.float32)


def stacked(made: Checkpoint, names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([made.numbers[name] for name in names])


def within_8_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell whether no number is further off than rounding a row to 8 bits takes it."""
    step = wanted.abs().amax(1, keepdim=True) / 127
    return bool(((found - wanted).abs() <= step * 0.501 + 1e-7).all())


@pytest.fixture(params=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our kernels as this machine has them, and as where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "_found", [None])


# --- kept as they are


@pytest.mark.parametrize("name", NF4)
@pytest.mark.usefixtures("kernels")
def test_nf4_is_kept_code_by_code(name: str, checkpoint_of: CheckpointOf) -> None:
    """What is not the file's own is each absmax, which has 16 bits here and 32, or 8 and 32, there."""
    made = checkpoint_of(name)
    decoder, _, plan = tiny.load(made.folder, strategy=None)
    assert plan.strategy == "4bit"
    stored = load_file(made.folder / "model.safetensors")
    for linear, names in products(decoder).values():
        assert isinstance(linear, Nf4Linear)
        assert torch.equal(linear.codes.flatten(), torch.cat([stored[one].flatten() for one in names]))
        torch.testing.assert_close(whole(linear), stacked(made, names), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", INT4)
@pytest.mark.usefixtures("kernels")
def test_codes_in_groups_are_kept_exactly(name: str, checkpoint_of: CheckpointOf) -> None:
    """aten, which multiplies where our kernels do not, has scales in bfloat16."""
    made = checkpoint_of(name)
    decoder, _, plan = tiny.load(made.folder, strategy=None)
    assert plan.strategy == "int4"
    for linear, names in products(decoder).values():
        within = linear.within if isinstance(linear, ReorderedLinear) else linear
        assert isinstance(within, AtenInt4Linear | Int4Linear)
        off = 5e-3 if isinstance(within, AtenInt4Linear) else 1e-6
        wanted = stacked(made, names)
        assert float((whole(linear) - wanted).norm() / wanted.norm()) < off
        assert isinstance(linear, ReorderedLinear) == ("act-order" in name)


@pytest.mark.parametrize("name", INT8)
@pytest.mark.usefixtures("kernels")
def test_rows_of_8_bits_are_kept_exactly(name: str, checkpoint_of: CheckpointOf) -> None:
    made = checkpoint_of(name)
    decoder, _, plan = tiny.load(made.folder, strategy=None)
    assert plan.strategy == "8bit"
    for linear, names in products(decoder).values():
        assert isinstance(linear, Int8Linear)
        torch.testing.assert_close(whole(linear), stacked(made, names), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_kept_nearly_as_it_is_in_the_bytes_that_were_planned(
    name: str, checkpoint_of: CheckpointOf
) -> None:
    """Never further off than by rounding to 8 bits."""
    made = checkpoint_of(name)
    decoder, spec, plan = tiny.load(made.folder, strategy=None)
    for linear, names in products(decoder).values():
        assert within_8_bits(whole(linear), stacked(made, names))
    taken, planned = decoder.weight_bytes(), dict(plan.weight_bytes)
    for linear, names in products(decoder).values():
        if isinstance(linear, ReorderedLinear):  # planned for each matrix, taken once for those of one product
            taken["linear"] += 4 * linear.columns * (len(names) - 1)
    if plan.strategy == "int4" and name.endswith("a row"):  # planned as aten would take them
        assert taken["linear"] <= planned.pop("linear") <= 1.03 * taken.pop("linear")
    assert taken == planned
    assert spec.quantized is not None
    assert any(spec.quantized.summary in reason for reason in plan.reasons)


@pytest.mark.parametrize("strategy", ["none", "8bit", "nf4"])
@pytest.mark.parametrize("name", ["AWQ, groups of 64", "bitsandbytes NF4", "FP8, blocks of 128 × 128"])
def test_who_asks_for_another_form_has_it_in_the_bytes_that_were_planned(
    strategy: str, name: str, checkpoint_of: CheckpointOf
) -> None:
    decoder, _, plan = tiny.load(checkpoint_of(name).folder, strategy=strategy)
    assert plan.strategy == {"nf4": "4bit"}.get(strategy, strategy)
    assert decoder.weight_bytes() == dict(plan.weight_bytes)


def test_nothing_is_lost_but_16_bits_where_all_is_made_whole(checkpoint_of: CheckpointOf) -> None:
    made = checkpoint_of("GPTQ, act-order, not symmetric")
    decoder = tiny.load(made.folder, strategy="none")[0]
    for linear, names in products(decoder).values():
        torch.testing.assert_close(whole(linear), stacked(made, names), rtol=1e-3, atol=1e-6)


# --- what was left out


@pytest.mark.parametrize(
    ("left_out", "part"), [(("down_proj",), "0.down"), (("layers.1.self_attn.k_proj",), "1.query_key_value")]
)
def test_what_its_maker_left_as_it_was_is_kept_in_8_bits(
    left_out: tuple[str, ...], part: str, plain: Path, tmp_path: Path
) -> None:
    """And so is what is multiplied together with it."""
    made = quantize_folder(plain, tmp_path / "model", nf4(), left_out=left_out)
    decoder, _, plan = tiny.load(made.folder, strategy=None)
    assert plan.strategy == "4bit"
    assert decoder.weight_bytes() == dict(plan.weight_bytes)
    linear, names = products(decoder)[part]
    assert isinstance(linear, Int8Linear)
    originals = load_file(plain / "model.safetensors")
    wanted = torch.cat([made.numbers.get(name, originals[name].float()) for name in names])
    assert within_8_bits(whole(linear), wanted)
    assert isinstance(products(decoder)["0.gate_up"][0], Nf4Linear)


# --- answers


@pytest.mark.parametrize(
    "name",
    ["bitsandbytes NF4", "bitsandbytes 8 bits", "AWQ", "GPTQ, act-order, not symmetric", "FP8, blocks of 128 × 128"],
)
def test_logits_are_those_of_transformers_with_the_same_numbers(
    name: str, plain: Path, checkpoint_of: CheckpointOf
) -> None:
    """Layers are what the decoder has, and they were held against the format above; embedding and head are rounded."""
    decoder = tiny.load(checkpoint_of(name).folder, strategy=None)[0]
    theirs = tiny.reference(plain)
    state = theirs.state_dict()
    for linear, names in products(decoder).values():
        for one, numbers in zip(names, whole(linear).split([len(state[one]) for one in names]), strict=True):
            state[one].copy_(numbers)
    state["model.embed_tokens.weight"].copy_(whole(decoder.embedding))
    state["lm_head.weight"].copy_(whole(decoder.head))
    ids = tiny.prompt(30)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].float()
    found = tiny.Sequences.of(decoder).feed(ids, every_token=True)
    assert tiny.difference(found, wanted) < 2e-3


@pytest.mark.parametrize(
    "how", [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
    ], ids=["nf4", "fp4", "int8"],
)  # fmt: skip
def test_what_transformers_quantises_and_saves_answers_as_transformers_loads_it(
    how: dict[str, object], plain: Path, tmp_path: Path
) -> None:
    """Made whole on both sides: transformers' own 8-bit product rounds activations too."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.BitsAndBytesConfig(**how)
    load(plain, quantization_config=config, dtype=torch.float32, device_map="cpu").save_pretrained(tmp_path / "saved")
    theirs = load(tmp_path / "saved", dtype=torch.float32, device_map="cpu", attn_implementation="eager").eval()
    theirs = theirs.dequantize(dtype=torch.float32).float()
    decoder, spec, _ = tiny.load(tmp_path / "saved", strategy="none")
    assert spec.quantized is not None
    ids = tiny.prompt(30)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].float()
    found = tiny.Sequences.of(decoder).feed(ids, every_token=True)
    assert tiny.difference(found, wanted) < 0.02  # numbers have 16 bits on our side


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("compressed-tensors W4A16", {"dtype": torch.float32}),
        ("compressed-tensors W8A16", {"dtype": torch.float32}),
        ("compressed-tensors FP8", {"dtype": torch.float32}),
        ("FP8, blocks of 128 × 128", {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}),
    ],
)  # fmt: skip
def test_what_transformers_reads_of_the_formats_it_means_what_we_mean(
    name: str, settings: dict[str, object], checkpoint_of: CheckpointOf
) -> None:
    """Made whole on both sides; of FP8 transformers makes bfloat16."""
    folder = checkpoint_of(name).folder
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, attn_implementation="eager", **settings).eval()
    theirs = theirs if "dtype" in settings else theirs.float()
    ids = tiny.prompt(30)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0].float()
    found = tiny.Sequences.of(tiny.load(folder, strategy="none")[0]).feed(ids, every_token=True)
    assert tiny.difference(found, wanted) < (0.05 if "quantization_config" in settings else 0.01)


def test_what_is_known_of_files_holds_for_parts_in_several(plain: Path, tmp_path: Path) -> None:
    """Where the tensors of one matrix are in two files, its digest is remembered as long as both stay as they are."""
    made = quantize_folder(plain, tmp_path / "model", nf4())
    file = made.folder / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    for number, some in enumerate((names[0::2], names[1::2])):
        part = made.folder / f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, part)
        os.utime(part, (1, 1))
    file.unlink()
    while not all(FileState.of(part).is_settled(time.time_ns()) for part in made.folder.glob("*.safetensors")):
        time.sleep(0.02)
    store = Store(tmp_path / "store")
    spec, plan = tiny.planned(resolve(str(made.folder)), strategy=None)
    build(plan, spec, store).settle()
    assert store.has(spec, "4bit")
    changed = sorted(made.folder.glob("*.safetensors"))[1]
    changed.write_bytes(changed.read_bytes())
    assert not store.has(spec, "4bit")


# --- what is told, and what is kept


def test_who_has_quantised_weights_quantised_anew_is_warned(checkpoint_of: CheckpointOf, events: list[Event]) -> None:
    folder = checkpoint_of("bitsandbytes NF4").folder
    tiny.load(folder, strategy=None)
    assert not [event for event in events if event.name == "load.warning"]
    tiny.load(folder, strategy="8bit")
    (warning,) = [event for event in events if event.name == "load.warning"]
    assert "bitsandbytes NF4" in warning.fields["reason"]
    assert "8bit adds its own error" in warning.fields["reason"]


@pytest.mark.parametrize("name", ["bitsandbytes NF4", "GPTQ, groups of 32, act-order"])
def test_the_store_has_the_same_weights(name: str, checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    spec, plan = tiny.planned(resolve(str(checkpoint_of(name).folder)), strategy=None)
    store = Store(tmp_path / "store")
    first = build(plan, spec, store)
    first.settle()
    second = build(plan, spec, store)
    assert second.attached is not None
    for part, (linear, _) in products(first).items():
        for tensor, again in zip(linear.tensors().values(), products(second)[part][0].tensors().values(), strict=True):
            assert torch.equal(tensor, again)
    second.release()


def test_the_same_bytes_with_another_meaning_are_another_entry(plain: Path, tmp_path: Path) -> None:
    """GPTQ's two versions differ in a word of config.json, which no digest of tensors has seen."""
    store = Store(tmp_path / "store")
    found = []
    for version in ("gptq", "gptq_v2"):
        form = gptq(version=1, is_symmetric=False)
        form = type(form)({**form.config, "checkpoint_format": version}, form.write)
        made = quantize_folder(plain, tmp_path / version, form)
        spec, plan = tiny.planned(resolve(str(made.folder)), strategy=None)
        decoder = build(plan, spec, store)
        decoder.settle()
        found.append(whole(products(decoder)["0.down"][0]))
    assert len(store.entries()) == 2
    assert not torch.allclose(*found)


def test_nf4_in_a_matrix_that_has_no_whole_blocks_goes_into_8_bits(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "plain", "llama", hidden_size=88, head_dim=22, intermediate_size=104)
    made = quantize_folder(folder, tmp_path / "model", nf4())
    decoder, _, plan = tiny.load(made.folder, strategy=None)
    assert plan.strategy == "8bit"
    for linear, names in products(decoder).values():
        assert within_8_bits(whole(linear), stacked(made, names))


def test_orders_that_differ_where_one_product_is_made_are_refused_with_what_helps(plain: Path, tmp_path: Path) -> None:
    made = quantize_folder(plain, tmp_path / "model", gptq(group=64, act_order=True))
    file = made.folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match="in different orders") as caught:
        tiny.load(made.folder, strategy=None)
    assert "quantization: 8bit" in str(caught.value)
    assert tiny.load(made.folder, strategy="8bit")[2].strategy == "8bit"
