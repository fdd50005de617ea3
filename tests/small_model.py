"""Writes a small random model as a folder of the Hub's kind: weights, tokenizer, chat template.

Its answers are noise, have no end but the one that is asked for, and take a millisecond a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 128, 256, 2, 4, 2, 32
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"
GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def write_small_model(folder: Path, **generation: Any) -> Path:
    """Write the model into `folder`; `generation` is its generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = _tokenizer()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_SIZE,
        "intermediate_size": INNER, "vocab_size": backend.get_vocab_size(), "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    for name, values in {
        "config.json": config,
        "tokenizer_config.json": {"chat_template": TEMPLATE},
        "generation_config.json": generation,
    }.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    save_file(_tensors(backend.get_vocab_size()), folder / "model.safetensors")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    """One token for each byte, so that random tokens are often halves of characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _tensors(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.1).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, HIDDEN), "lm_head.weight": matrix(vocabulary, HIDDEN)}
    norms = ["model.norm.weight"]
    for index in range(LAYERS):
        at = f"model.layers.{index}"
        norms += [f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"]
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * HEAD_SIZE, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_SIZE, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_SIZE, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_SIZE),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            tensors[f"{at}.{name}.weight"] = matrix(rows, columns)
    return tensors | {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
