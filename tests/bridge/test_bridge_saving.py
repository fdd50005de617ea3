"""`save_pretrained`: a bitsandbytes checkpoint of 8 or 4 bits, or plain floats, which transformers loads again."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open

from loadstone import ConfigurationError, GenerationError, ModelManager, ModelNotLoadedError, ResourceError
from loadstone.bridge import shards
from loadstone.bridge._transformers import make_model
from loadstone.bridge.lent import Loan
from loadstone.quantization._bitsandbytes import BitsandbytesNf4

IDS = tiny.prompt(40)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _again(folder: Path) -> Any:
    """Return what transformers loads from a folder, then computing in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
    return model


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([IDS])).logits[0]
    return found


# Random models make much of little: embedding, head and norms are rounded to bfloat16 beside quantised layers, and
# bitsandbytes rounds in its products: scales or all of it to bfloat16 (4bit), activations to 8 bits (8bit).
CLOSE = {"none": 1e-4, "4bit": 0.12, "8bit": 0.12, "int4": 0.12}


@pytest.mark.parametrize("strategy", CLOSE)
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3", "mistral-window", "llama3-positions"])
def test_transformers_loads_it_again(seen: Callable[..., Any], tmp_path: Path, variant: str, strategy: str) -> None:
    one = seen(variant, strategy)
    one.model.save_pretrained(tmp_path)
    again = _again(tmp_path)
    assert type(again).__name__ == type(one.model).__name__
    assert _difference(_logits(again), _logits(one.model)) < CLOSE[strategy]


@pytest.mark.parametrize(
    ("strategy", "name"), [("4bit", "Linear4bit"), ("8bit", "Linear8bitLt"), ("int4", "Linear"), ("none", "Linear")]
)
def test_its_layers_are_bitsandbytes_own(seen: Callable[..., Any], tmp_path: Path, strategy: str, name: str) -> None:
    seen("qwen2", strategy).model.save_pretrained(tmp_path)
    again = _again(tmp_path)
    assert type(again.model.layers[0].mlp.down_proj).__name__ == name
    assert type(again.lm_head).__name__ == "Linear"
    is_quantised = strategy in ("4bit", "8bit")
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == is_quantised


def test_its_4_bits_are_ours(seen: Callable[..., Any], tmp_path: Path) -> None:
    """What bitsandbytes makes of them is what we make of them, number by number."""
    import bitsandbytes.functional as bitsandbytes

    one = seen("qwen2", "4bit")
    one.model.save_pretrained(tmp_path)
    again = _again(tmp_path)
    for name, module in again.named_modules():
        if type(module).__name__ == "Linear4bit":
            found = bitsandbytes.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(found, one.model.get_submodule(name).weight.numbers()), name


def test_its_8_bits_are_ours(seen: Callable[..., Any], tmp_path: Path) -> None:
    one = seen("qwen2", "8bit")
    one.model.save_pretrained(tmp_path)
    tensors = _tensors(tmp_path)
    name = "model.layers.1.mlp.up_proj"
    found = tensors[f"{name}.weight"].float() * tensors[f"{name}.SCB"][:, None] / 127
    torch.testing.assert_close(found, one.model.get_submodule(name).weight.numbers())


def test_unquantised_numbers_stay_what_they_are(seen: Callable[..., Any], tmp_path: Path) -> None:
    one = seen("llama", "none")
    one.model.save_pretrained(tmp_path)
    for name, tensor in _tensors(tmp_path).items():
        assert torch.equal(tensor, one.model.get_parameter(name).numbers())


def test_doubly_quantised_scales_stay_so(seen: Callable[..., Any], tmp_path: Path) -> None:
    """As a GPU keeps them: rows that share no scale with others go over as they are, the others' scales as float32."""
    one = seen("llama", "none")
    weights = {
        name: BitsandbytesNf4.quantize(kept.weight) if "down_proj" in name or "mlp.up" in name else kept
        for name, kept in one.loan.weights().items()
    }
    whole = BitsandbytesNf4.quantize(
        torch.cat([one.loan.of(f"model.layers.0.mlp.{n}_proj.weight").weight for n in ("gate", "up")])
    )
    weights["model.layers.0.mlp.up_proj.weight"] = whole.part(192, 384)
    loan = Loan(weights, torch.float32, torch.device("cpu"), lambda count: None)
    model = make_model(one.spec, loan)
    model.save_pretrained(tmp_path)
    tensors = _tensors(tmp_path)
    assert "model.layers.1.mlp.down_proj.weight.nested_absmax" in tensors
    assert tensors["model.layers.0.mlp.up_proj.weight.absmax"].dtype == torch.float32
    assert _difference(_logits(_again(tmp_path)), _logits(model)) < CLOSE["4bit"]


def test_what_bitsandbytes_has_no_form_for_is_written_whole(seen: Callable[..., Any], tmp_path: Path) -> None:
    """Rows that are no whole blocks are kept in 8 bits under `4bit`."""
    one = seen("odd-sizes", "4bit")
    one.model.save_pretrained(tmp_path)
    assert _difference(_logits(_again(tmp_path)), _logits(one.model)) < CLOSE["4bit"]


def test_shards_are_as_large_as_was_asked(seen: Callable[..., Any], tmp_path: Path) -> None:
    one = seen("qwen2", "4bit")
    one.model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert set(index["weight_map"]) == set(_tensors(tmp_path))
    assert _difference(_logits(_again(tmp_path)), _logits(one.model)) < CLOSE["4bit"]


def test_saving_again_leaves_nothing_of_before(seen: Callable[..., Any], tmp_path: Path) -> None:
    model = seen("qwen2", "4bit").model
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "notes.txt"
    }  # fmt: skip


def test_the_managers_model_can_be_saved_and_asked(manager: ModelManager, tmp_path: Path) -> None:
    """With its tokenizer, whose template and ids are the same again."""
    tokenizer, model = manager.load_base_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("投资 Hi")["input_ids"] == tokenizer("投资 Hi")["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    ids = torch.tensor([[*b"Hi"]])
    assert _difference(_again(tmp_path)(ids).logits, model(ids).logits) < CLOSE["4bit"]
    assert str(manager.load().spec.folder) not in (tmp_path / "config.json").read_text()


# -- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"push_to_hub": True}, {"state_dict": {"a": torch.ones(1)}}, {"variant": "fp16"}, {"max_shard_size": "much"}],
)
def test_what_it_cannot_do_is_refused(seen: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        seen("qwen2").model.save_pretrained(tmp_path / "to", **settings)
    assert not (tmp_path / "to").exists()


def test_the_models_own_folder_is_not_written_to(seen: Callable[..., Any]) -> None:
    one = seen("qwen2")
    with pytest.raises(ConfigurationError, match="model's own"):
        one.model.save_pretrained(one.folder)


def test_a_file_is_no_folder(seen: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="is a file"):
        seen("qwen2").model.save_pretrained(tmp_path / "file")


def test_a_full_disk_is_told_before_anything_is_written(
    seen: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10**6, 10**6 - 100, 100))
    with pytest.raises(ResourceError, match="100 B free"):
        seen("qwen2").model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_goes_wrong_in_the_midst_leaves_what_was_there(
    seen: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seen("qwen2", "4bit").model
    model.save_pretrained(tmp_path)
    before = _tensors(tmp_path)
    real, calls = shards._write, []

    def fail(file: Path, tensors: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(file, tensors)

    monkeypatch.setattr(shards, "_write", fail)
    with pytest.raises(GenerationError, match="No space left"):
        model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert not [*tmp_path.glob("*.part")]
    assert _tensors(tmp_path).keys() == before.keys()


def test_an_unloaded_model_cannot_be_saved(one_life: ModelManager, tmp_path: Path) -> None:
    _, model = one_life.load_base_model()
    one_life.unload_model()
    with pytest.raises(ModelNotLoadedError, match="load_base_model"):
        model.save_pretrained(tmp_path / "to")
