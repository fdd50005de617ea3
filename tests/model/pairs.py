"""The checkpoints that our decoder and transformers' are compared on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadstone.model import Decoder

# Kinds of positions as files have them; the trained lengths are short, so that 100 tokens go beyond them.
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-head-size": ("llama", {"head_dim": 64}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-positions": ("llama", {"rope_parameters": _LLAMA3}),
    "linear-positions": ("llama", {"rope_parameters": _LINEAR}),
    "dynamic-positions": ("llama", {"rope_parameters": _DYNAMIC}),
    "odd-sizes": ("llama", {"hidden_size": 120, "head_dim": 30, "intermediate_size": 200}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 17}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": _YARN}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3-mha-tied": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4, "tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, loaded by us and by transformers."""

    folder: Path
    ours: Decoder
    theirs: Any

    @torch.inference_mode()
    def wanted(self, ids: list[int]) -> torch.Tensor:
        """Return transformers' logits after each of the tokens."""
        logits: torch.Tensor = self.theirs(torch.tensor([ids])).logits[0].float()
        return logits
