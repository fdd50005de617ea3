"""Writes any checkpoint that Loadstone reads as bfloat16 safetensors with a head of its own.

Two sides can then read the very same numbers, also of a GGUF file, and a head can be kept otherwise than the embedding
that it was tied to. The tokenizer stays behind: who compares numbers passes tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from loadstone.checkpoint import ModelSpec, open_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_untied(spec: ModelSpec, folder: Path) -> None:
    """Write `spec`'s weights, rounded to bfloat16, and its config.json into `folder`: one file for each layer.

    Raises ValueError for rotation that config.json has no words for: GGUF's own list of factors.
    """
    import torch
    from safetensors.torch import save_file

    if spec.rope["rope_type"] == "factors":
        raise ValueError(f"{spec.name}: config.json cannot say how its positions are scaled")
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    with open_weights(spec) as weights:
        for number, names in enumerate(_by_layer(weights.names())):
            tensors = {name: weights.tensor(name).to(torch.bfloat16) for name in names}
            if spec.tied_embeddings and EMBEDDING in tensors:
                tensors[HEAD] = tensors[EMBEDDING].clone()
            file = f"model-{number:05d}.safetensors"
            save_file(tensors, folder / file)
            places.update(dict.fromkeys(tensors, file))
    config = {**spec.config, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _by_layer(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield the names of each layer together, and those outside of all layers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        _, is_inside, rest = name.partition(".layers.")
        groups.setdefault(rest.split(".")[0] if is_inside else "", []).append(name)
    yield from groups.values()
