"""Writes random-weight checkpoints with the shapes of Qwen2.5, so that speed and memory can be measured offline.

    python -m benchmarks.checkpoints qwen2.5-0.5b FOLDER [--tokenizer FOLDER] [--shard-size 4GB]

Files, names, types and sharding are those of the Hub's; what such a model answers is noise. Weights are streamed
straight into their files: memory stays below half a gigabyte whatever the model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loadstone.units import format_size, parse_size

from .tokenizer import write_tokenizer

SPREAD = 0.02  # standard deviation of the weights, as Qwen2.5 is initialised
POOL_NUMBERS = 1 << 25  # random numbers made once; every tensor takes stretches of them from random places
SHARD_SIZE = "4GB"


@dataclass(frozen=True)
class Shape:
    """The sizes of one model, under the names that config.json has for them."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    model_type: str = "qwen2"
    head_dim: int | None = None  # where it is not hidden_size / num_attention_heads
    sliding_window: int | None = None

    @property
    def head_size(self) -> int:
        """How wide a head is."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of every tensor, in the order in which the Hub's files have them."""
        hidden, inner, size = self.hidden_size, self.intermediate_size, self.head_size
        queries, keys = size * self.num_attention_heads, size * self.num_key_value_heads
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (hidden,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
                if self.model_type == "qwen2":
                    yield f"{at}.self_attn.{name}_proj.bias", (rows,)
            if self.model_type == "qwen3":
                for name in ("q", "k"):
                    yield f"{at}.self_attn.{name}_norm.weight", (size,)
            yield f"{at}.self_attn.o_proj.weight", (hidden, queries)
            yield f"{at}.post_attention_layernorm.weight", (hidden,)
            yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{at}.mlp.up_proj.weight", (inner, hidden)
            yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151_936, True),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151_936, True),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18_944, 152_064, False),
}


def write_checkpoint(
    shape: Shape, folder: Path, *, tokenizer: Path | None = None, seed: int = 0, shard_bytes: int | None = None
) -> int:
    """Write a checkpoint of random bfloat16 weights into `folder` and return the bytes of its weights.

    `tokenizer` is a folder whose tokenizer.json and its companions are copied; without it one of the same size as
    Qwen's is made. `shard_bytes` is the most that one file holds, unless a single tensor is larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "generation_config.json", _generation_config())
    if tokenizer is None:
        write_tokenizer(folder)
    else:
        for file in tokenizer.glob("*.json"):
            if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab")):
                shutil.copyfile(file, folder / file.name)
    return _write_weights(shape, folder, seed, shard_bytes or parse_size(SHARD_SIZE))


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": [f"{shape.model_type.capitalize()}ForCausalLM"],
        "torch_dtype": "bfloat16",
        **{name: value for name, value in vars(shape).items() if value is not None},
        "hidden_act": "silu",
        "initializer_range": SPREAD,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        **({"use_sliding_window": False} if shape.model_type.startswith("qwen") else {}),
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    }


def _generation_config() -> dict[str, object]:
    return {
        "bos_token_id": 151_643,
        "pad_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    }


def _write_weights(shape: Shape, folder: Path, seed: int, shard_bytes: int) -> int:
    shards = _shards(shape, shard_bytes)
    noise = _Noise(seed)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, noise)
        places.update(dict.fromkeys(shard, name))
    total = sum(2 * math.prod(size) for shard in shards for size in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    return total


def _shards(shape: Shape, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Return the tensors of each file, filled in order up to `shard_bytes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shape.tensors():
        taken = 2 * math.prod(size)
        if shards[-1] and filled + taken > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += taken
    return shards


def _write_shard(file: Path, tensors: dict[str, tuple[int, ...]], noise: _Noise) -> None:
    """Write one safetensors file: the header's length, the header as JSON, then the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins aligned
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, size in tensors.items():
            if "norm" in name:
                out.write(struct.pack("<H", 0x3F80) * math.prod(size))  # 1.0 in bfloat16
            else:
                noise.write(out, math.prod(size))


class _Noise:
    """Random bfloat16 numbers, from one pool: fresh ones for billions of weights would take minutes."""

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        pool = torch.empty(POOL_NUMBERS, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=self._generator)
        self._pool = memoryview(pool.view(torch.uint8).numpy())

    def write(self, out: BinaryIO, count: int) -> None:
        """Write `count` numbers."""
        import torch

        while count:
            start = int(torch.randint(POOL_NUMBERS // 2, (1,), generator=self._generator))
            taken = min(count, POOL_NUMBERS - start)
            out.write(self._pool[2 * start : 2 * (start + taken)])
            count -= taken


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write the checkpoint that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json to copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=parse_size, default=SHARD_SIZE, help=f"default {SHARD_SIZE}")
    said = parser.parse_args(arguments)
    if said.tokenizer is not None and not (said.tokenizer / "tokenizer.json").is_file():
        parser.error(f"{said.tokenizer} has no tokenizer.json")
    shape = SHAPES[said.shape]
    total = write_checkpoint(
        shape, said.folder, tokenizer=said.tokenizer, seed=said.seed, shard_bytes=said.shard_size
    )  # fmt: skip
    files = len(list(said.folder.glob("*.safetensors")))
    print(f"{said.shape}: {format_size(total)} of weights in {files} file(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
