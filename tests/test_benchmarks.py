"""The benchmarks' own parts: checkpoints that load, and a table that is read the right way round."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from benchmarks import main_job
from benchmarks.checkpoints import SHAPES, Shape, write_checkpoint
from benchmarks.prompts import prompt_of

from loadstone import ModelManager
from loadstone.checkpoint import inspect
from loadstone.sources import resolve

TINY = Shape(64, 2, 4, 2, 128, 152_064, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    write_checkpoint(TINY, folder, shard_bytes=20_000_000)
    return folder


def test_a_checkpoint_is_sharded_like_the_hubs(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == sorted(file.name for file in checkpoint.glob("*.safetensors"))
    assert len(list(checkpoint.glob("*.safetensors"))) > 1


def test_a_checkpoint_has_every_tensor_of_its_model(checkpoint: Path) -> None:
    spec = inspect(resolve(str(checkpoint)))
    assert spec.architecture.name == "qwen2"
    assert set(spec.tensors) == {name for name, _ in TINY.tensors()}


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-7b", 7.616)]
)
def test_shapes_have_as_many_parameters_as_the_models_they_stand_for(name: str, billions: float) -> None:
    total = 0
    for _, size in SHAPES[name].tensors():
        total += size[0] * (size[1] if len(size) == 2 else 1)
    assert total / 1e9 == pytest.approx(billions, abs=5e-4)


def test_transformers_reads_the_checkpoint_too(checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"]
    assert model.config.model_type == "qwen2"
    assert tokenizer.decode(tokenizer("什么是通货膨胀 😀")["input_ids"]) == "什么是通货膨胀 😀"


def test_a_checkpoint_loads_in_4_bits_and_answers(checkpoint: Path) -> None:
    wish = {"base_model": str(checkpoint), "device": "cpu", "quantization": "4bit", "context": 256}
    with ModelManager({"model_config": wish}) as manager:
        tokenizer = manager.load().tokenizer
        text = prompt_of(40, lambda text: len(tokenizer.encode(text, add_special_tokens=True)))
        result = manager.generate(text, raw=True, temperature=0, max_new_tokens=4)
    assert 40 <= result.usage.prompt_tokens <= 48
    assert result.usage.completion_tokens > 0


def test_times_better_is_above_one_where_ours_is_faster_or_smaller() -> None:
    ours = {key: 10.0 if is_more else 2.0 for key, _, _, is_more in main_job.MEASURES}
    peer = {key: 5.0 if is_more else 4.0 for key, _, _, is_more in main_job.MEASURES}
    assert set(main_job.ratios(ours, peer).values()) == {2.0}


def test_the_two_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(main_job, "run_module", lambda module, *_: order.append(module) or {})
    said = Namespace(
        model="m", device="cpu", quantization="4bit", max_memory=None, tokens=4, peer=True, repetitions=3,
        peer_repetitions=2,
    )  # fmt: skip
    main_job.measure(said, 2, main_job.Console(quiet=True))
    ours, peer = main_job.OURS, main_job.PEER
    assert order == [ours, peer, ours, peer, ours]


@pytest.mark.parametrize("model", ["smollm2", "folder/model.gguf"])
def test_the_peer_is_refused_what_it_cannot_read(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_job.parse([model, "--peer"])
    assert ended.value.code == 2
    assert "safetensors" in capsys.readouterr().err
