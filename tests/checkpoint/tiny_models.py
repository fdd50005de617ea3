"""Writes small whole checkpoints, as safetensors folders and as GGUF files, for the tests of this room."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from loadstone.checkpoint import config_json
from loadstone.checkpoint.architectures import find_architecture
from loadstone.checkpoint.layout import expected_tensors
from loadstone.sources.base import ModelFiles

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INNER, VOCAB = 2, 4, 2, 64, 256, 512, 96

_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tiny_config(model_type: str = "qwen2", **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE,
        "intermediate_size": INNER, "vocab_size": VOCAB, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return {**config, **changes}


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    architecture = find_architecture(config["model_type"])
    assert architecture is not None
    sizes = config_json.sizes_of(config, architecture, Path("config.json"))
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype)
        for name, shape in expected_tensors(architecture, sizes).items()
    }


@dataclass
class Folder:
    """A checkpoint folder under construction; `files()` is what a source would return for it."""

    path: Path

    def write(self, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, shards: int = 1) -> Folder:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = random_tensors(config) if tensors is None else tensors
        if shards == 1:
            save_file(tensors, self.path / "model.safetensors")
            return self
        names = list(tensors)
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, self.path / file)
            places.update(dict.fromkeys(part, file))
        self.write_index(places)
        return self

    def write_index(self, places: dict[str, str]) -> None:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (self.path / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def files(self) -> ModelFiles:
        return ModelFiles("tiny", self.path, tuple(sorted(self.path.glob("*.safetensors"))), "test")


def gguf_files(file: Path) -> ModelFiles:
    return ModelFiles("tiny", file.parent, (file,), "test")


def gguf_name(name: str) -> str:
    outside = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    if name in outside:
        return outside[name]
    _, _, layer, *inside, kind = name.split(".")
    return f"blk.{layer}.{_GGUF_NAMES['.'.join(inside)]}.{kind}"


def as_converter_orders(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q's or k's rows as llama.cpp's converter does: it interleaves the two halves of each head."""
    halves = numbers.reshape(heads, 2, numbers.shape[0] // heads // 2, *numbers.shape[1:])
    return halves.swapaxes(1, 2).reshape(numbers.shape)


def write_gguf(
    file: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    leave_out: tuple[str, ...] = (),
    permute: bool | None = None,
) -> Path:
    """Write `tensors` with gguf's own writer; matrices as `kind`, the rest F32. `metadata` overrides keys."""
    architecture = find_architecture(config["model_type"])
    assert architecture is not None
    prefix = architecture.gguf_name
    writer = gguf.GGUFWriter(file, prefix)
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"],
        "rope.freq_base": config["rope_theta"], "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }  # fmt: skip
    every = {f"{prefix}.{key}": value for key, value in values.items() if key not in leave_out}
    every |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2} | (metadata or {})
    for key, value in every.items():
        _add(writer, key, value)
    wanted = gguf.GGMLQuantizationType[kind]
    is_permuted = architecture.gguf_permutes_rope if permute is None else permute
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads and is_permuted:
            numbers = as_converter_orders(numbers, heads)
        matrix = wanted if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(numbers, matrix), raw_dtype=matrix)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
