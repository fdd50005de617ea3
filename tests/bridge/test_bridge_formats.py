"""Checkpoints of every kind that we read are seen through transformers, whatever it makes of such files itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from tests.checkpoint.tiny_models import HEAD_SIZE, VOCAB, random_tensors, tiny_config, write_gguf
from tests.quantized_checkpoints import FORMATS, quantize_folder
from views import Seen, see

IDS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def _difference(one: Seen) -> float:
    with torch.inference_mode():
        found = one.model(torch.tensor([IDS])).logits[0]
    return tiny.difference(found, one.decoder.logits(IDS))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    assert _difference(see(write_gguf(tmp_path / "model.gguf", config, random_tensors(config)))) < 1e-3


def test_a_gguf_file_whose_positions_are_scaled(tmp_path: Path) -> None:
    """llama3's scaling comes as one factor for each frequency there; transformers says it as its longrope."""
    config = tiny_config("llama")
    turns = 64 / 10000.0 ** (torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE) / (2 * math.pi)
    blend = ((turns - 1.0) / 3.0).clamp(0, 1)
    factors = (1 / (blend + (1 - blend) / 8.0)).float().numpy()
    file = write_gguf(tmp_path / "model.gguf", config, random_tensors(config), extra={"rope_freqs.weight": factors})
    one = see(file)
    assert _difference(one) < 1e-3
    assert one.model.config.rope_parameters["rope_type"] == "longrope"


def test_a_gguf_file_with_yarn(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    said = {
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
    }  # fmt: skip
    assert _difference(see(write_gguf(tmp_path / "m.gguf", config, random_tensors(config), metadata=said))) < 1e-3


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, form: str) -> None:
    plain = tiny.write(tmp_path / "plain", "llama", torch.bfloat16, hidden_size=256, intermediate_size=384)
    one = see(quantize_folder(plain, tmp_path / "quantised", FORMATS[form]()).folder, "auto")
    # Groups of 32 are multiplied by aten, in bfloat16, where the rows of a stack are dequantised.
    assert _difference(one) < (0.15 if "32" in form else 5e-3)


def test_what_it_saves_we_load_again(tmp_path: Path) -> None:
    """The very codes: 4 bits that were saved as bitsandbytes has them are kept as they come."""
    first = see(tiny.write(tmp_path / "plain", "qwen2", torch.bfloat16), "4bit")
    first.model.save_pretrained(tmp_path / "saved")
    again = see(tmp_path / "saved", "auto")
    for name, kept in first.loan.weights().items():
        if "_proj.weight" in name:
            assert torch.equal(again.model.get_parameter(name).numbers(), first.model.get_parameter(name).numbers())
            assert type(again.loan.of(name)) is type(kept)
