"""Small random checkpoints, written by transformers, and the real path that loads them.

Files → spec → plan → decoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from loadstone.checkpoint import inspect
from loadstone.checkpoint.spec import ModelSpec
from loadstone.config import LoadConfig
from loadstone.hardware import Device, MemorySettings
from loadstone.model import Decoder, KVCache, Segment, blocks_for, build
from loadstone.planner import Plan, plan
from loadstone.quantization.kernels.words import KV_BLOCK
from loadstone.sources import ModelFiles, resolve

VOCAB = 300
CPU = Device("cpu", None, "a processor", 64 << 30, 64 << 30, 2)
SETTINGS = MemorySettings("float32", "float32", 512, 0)
_SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_CONFIGS = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
}  # fmt: skip


def write(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a random model with config.json and model.safetensors in `folder`, as transformers writes them."""
    config = _CONFIGS[model_type](**{**_SIZES, **changes})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # transformers starts them at zero, where a lost one would not show
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a value of None removes the key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def reference(folder: Path) -> Any:
    """Return transformers' model of the folder, in float32 and with its plainest attention."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="eager").eval()


def planned(
    files: ModelFiles, *, strategy: str | None = "none", context: int | None = 256,
    settings: MemorySettings = SETTINGS,
) -> tuple[ModelSpec, Plan]:  # fmt: skip
    """Return spec and plan of a load; a strategy of None is one that nobody asked for."""
    spec = inspect(files)
    said = {} if strategy is None else {"quantization": strategy}
    wish = LoadConfig(base_model=files.name, context=context, **said)
    return spec, plan(wish, spec, CPU, settings, runtime_bytes=0, resident_bytes=0)


def load(place: Path | str, **wishes: Any) -> tuple[Decoder, ModelSpec, Plan]:
    """Load a folder, or the bundled model by its name."""
    files = resolve(str(place))
    spec, decision = planned(files, **wishes)
    return build(decision, spec), spec, decision


@dataclass
class Sequences:
    """Sequences of tokens that share one decoder and one cache, in which their blocks are mixed."""

    decoder: Decoder
    cache: KVCache
    tables: list[torch.Tensor]

    @classmethod
    def of(cls, decoder: Decoder, count: int = 1, room: int = 160) -> Sequences:
        cache = decoder.new_cache(count * blocks_for(room) * KV_BLOCK)
        mixed = torch.randperm(cache.blocks, generator=torch.Generator().manual_seed(1))
        return cls(decoder, cache, [*mixed.chunk(count)])

    def feed(self, ids: Sequence[int], start: int = 0, *, index: int = 0, every_token: bool = False) -> torch.Tensor:
        """Return the logits after new tokens of one sequence, the first of them at `start`."""
        segment = Segment(self.tables[index], start, len(ids), len(ids) if every_token else 1)
        return self.decoder.forward(ids, [segment], self.cache)

    def together(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], *, every_token: bool = False
    ) -> torch.Tensor:
        """Return the logits after new tokens of all sequences, made in one forward pass."""
        segments = [
            Segment(table, start, len(part), len(part) if every_token else 1)
            for table, part, start in zip(self.tables, ids, starts, strict=False)  # some may rest
        ]
        flat = [one for part in ids for one in part]
        return self.decoder.forward(flat, segments, self.cache)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number wanted."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
