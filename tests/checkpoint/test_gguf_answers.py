"""A model is the same model in either format, and one of a registered kind is decoded like a built-in one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import HEAD_SIZE, Folder, gguf_files, random_tensors, tiny_config, write_gguf

from loadstone.checkpoint import inspect, open_weights
from loadstone.checkpoint.architectures import ARCHITECTURES, find_architecture, register_architecture
from loadstone.config import LoadConfig
from loadstone.hardware import Device, MemorySettings
from loadstone.model import build
from loadstone.planner import plan
from loadstone.quantization import STRATEGIES, register_strategy
from loadstone.quantization.none import NoQuantization
from loadstone.sources.base import ModelFiles

PROMPT = [5, 9, 2, 77, 31, 8, 64, 3, 12, 40]
EXACT = MemorySettings("float32", "float32", 64, 0)
CPU = Device("cpu", None, "a processor", 64 << 30, 64 << 30, 2)


def logits(files: ModelFiles, strategy: str = "none") -> torch.Tensor:
    """Return the logits after every token of PROMPT, by the real path."""
    spec = inspect(files)
    wish = LoadConfig(base_model="tiny", quantization=strategy, context=256)
    decision = plan(wish, spec, CPU, EXACT, runtime_bytes=0, resident_bytes=0)
    with open_weights(spec) as weights:
        decoder = build(decision, spec, weights)
    return decoder.logits(PROMPT)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gguf_and_safetensors_give_the_same_logits(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type)
    tensors = random_tensors(config)
    folder = Folder(tmp_path / "folder").write(config, tensors)
    file = write_gguf(tmp_path / "model.gguf", config, tensors)
    torch.testing.assert_close(logits(gguf_files(file)), logits(folder.files()), rtol=1e-5, atol=1e-5)


def test_mistral_in_gguf_keeps_its_window(tmp_path: Path) -> None:
    config = tiny_config("mistral", sliding_window=4)
    tensors = random_tensors(config)
    folder = Folder(tmp_path / "folder").write(config, tensors)
    window = {"llama.attention.sliding_window": 4}
    file = write_gguf(tmp_path / "model.gguf", config, tensors, metadata=window)
    torch.testing.assert_close(logits(gguf_files(file)), logits(folder.files()), rtol=1e-5, atol=1e-5)


def test_rope_factors_in_gguf_are_llama3_scaling(tmp_path: Path) -> None:
    """The converter turns llama3's settings into one factor a frequency, as its formula defines them."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config: dict[str, Any] = tiny_config("llama", rope_scaling=scaling)
    tensors = random_tensors(config)
    folder = Folder(tmp_path / "folder").write(config, tensors)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE)
    turns = 64 * frequencies / (2 * math.pi)
    blend = ((turns - 1.0) / 3.0).clamp(0, 1)
    factors = (1 / (blend + (1 - blend) / 8.0)).float().numpy()
    file = write_gguf(tmp_path / "model.gguf", config, tensors, extra={"rope_freqs.weight": factors})
    torch.testing.assert_close(logits(gguf_files(file)), logits(folder.files()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_packed_weights_answer_much_like_the_whole_ones(tmp_path: Path, kind: str) -> None:
    config = tiny_config("qwen2")
    tensors = random_tensors(config)
    whole = logits(Folder(tmp_path / "folder").write(config, tensors).files())
    packed = logits(gguf_files(write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)))
    assert torch.nn.functional.cosine_similarity(packed, whole).min() > 0.9


def test_a_registered_architecture_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCHITECTURES, "_things", dict(ARCHITECTURES._things))
    llama = find_architecture("llama")
    assert llama is not None
    register_architecture(replace(llama, name="herd"))
    tensors = random_tensors(tiny_config("llama"))
    known = logits(Folder(tmp_path / "llama").write(tiny_config("llama"), tensors).files())
    new = logits(Folder(tmp_path / "herd").write(tiny_config("herd"), tensors).files())
    torch.testing.assert_close(new, known, rtol=0, atol=0)


def test_a_registered_strategy_keeps_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_things", dict(STRATEGIES._things))

    class Plain(NoQuantization):
        name = "plain"

    register_strategy(Plain())
    files = Folder(tmp_path / "folder").write(tiny_config("qwen2")).files()
    torch.testing.assert_close(logits(files, "plain"), logits(files, "none"), rtol=0, atol=0)
