"""What the headers of a checkpoint say, in one shape for every format.

Names of tensors are the Hub's (`model.layers.0.self_attn.q_proj.weight`) and `config` has the keys of
config.json, whatever the format on disk, so nothing above this room knows which format a model came in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .architectures import Architecture
from .coding import Coding, Quantized

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it.

    `shape` is rows × columns as torch has it. `dtype` is the type on disk: "BF16", "F16", "F32" or a GGUF
    type such as "Q4_K". `offset` and `nbytes` place it in `file`, in bytes from the file's start.
    `stored_name` is its name in the file. `digest` says what its bytes are, where only that is kept of them.

    Of a weight that is quantised already, `coding` says how; `shape` is that of its numbers, `parts` are the tensors
    in the files that it is made from, `nbytes` is what they take together, and `dtype` a name for such weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    stored_name: str
    digest: str | None = None
    coding: Coding | None = None
    parts: tuple[TensorInfo, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that its bytes are in: one, but for the parts of a quantised weight."""
        return tuple(dict.fromkeys(part.file for part in self.parts)) or (self.file,)

    @property
    def elements(self) -> int:
        """How many numbers the tensor holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class ModelSpec:
    """A model as its headers describe it: sizes, tensors, and what generation_config.json recommends.

    `rope` is config.json's rope settings, normalised: `rope_theta` and `rope_type` always ("default",
    "linear", "dynamic", "yarn", "llama3"), with the type's parameters when positions are scaled. GGUF files
    state llama3's scaling as `rope_type` "factors" with `factors`, the head_size / 2 numbers that divide the
    frequencies. `sliding_window` is the width in tokens, or None; `windowed_layers` says which layers use it.
    `max_context` is in tokens, after scaling. `tensors` are those that the model uses: a tied lm_head is left
    out. `quantized` is what config.json says of weights that are quantised already. `eos_token_ids` are all the tokens
    that end an answer. `left_alone` names the matrices that are not to be quantised, whatever the strategy: see
    `leaving_alone`.
    """

    name: str
    architecture: Architecture
    format: str
    origin: str
    revision: str | None
    folder: Path
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # bias on o_proj
    mlp_bias: bool
    hidden_act: str
    rope: Mapping[str, Any]
    sliding_window: int | None
    windowed_layers: tuple[bool, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantized: Quantized | None = None
    left_alone: frozenset[str] = frozenset()

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def parameters_by_part(self) -> dict[str, int]:
        """How many numbers each part holds: embedding, linear, lm_head, and norm (with biases)."""
        parts = dict.fromkeys(("embedding", "linear", "lm_head", "norm"), 0)
        for name, tensor in self.tensors.items():
            parts[self.part_of(name)] += tensor.elements
        return parts

    @cached_property
    def codings(self) -> Mapping[Coding, int]:
        """How many numbers of the layers' matrices are quantised already, by how."""
        found: dict[Coding, int] = {}
        for name, tensor in self.tensors.items():
            if tensor.coding is not None and self.part_of(name) == "linear":
                found[tensor.coding] = found.get(tensor.coding, 0) + tensor.elements
        return found

    @property
    def kv_elements_per_token(self) -> int:
        """How many numbers the KV cache keeps for each token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def part_of(self, name: str) -> str:
        """Return a tensor's part: "embedding", "lm_head", "linear" or "norm" (biases and norms)."""
        if name == "model.embed_tokens.weight":
            return "embedding"
        if name.startswith("lm_head."):
            return "lm_head"
        return "linear" if len(self.tensors[name].shape) == 2 else "norm"

    def leaving_alone(self, modules: Collection[str]) -> ModelSpec:
        """Return the same model with matrices that are not to be quantised, and those that they are multiplied with.

        A module is named by its whole name, or by any of its dotted parts: `lm_head`, `down_proj`, `model.layers.0`.
        The head of a model with tied embeddings is its embedding.
        """
        found: set[str] = set()
        for name, tensor in self.tensors.items():
            is_head = self.tied_embeddings and self.part_of(name) == "embedding"
            names = (name, "lm_head.weight") if is_head else (name,)
            if len(tensor.shape) == 2 and any(f".{one}." in f".{own}" for one in modules for own in names):
                found.update(self.multiplied_with(name))
        return replace(self, left_alone=frozenset(found)) if modules else self

    def multiplied_with(self, name: str) -> tuple[str, ...]:
        """Return the names of the matrices that the same x is multiplied with, `name` among them: q, k and v; gate and
        up; any other alone."""
        *before, module, kind = name.split(".")
        together = next((one for one in _TOGETHER if module in one), (module,))
        return tuple(".".join([*before, one, kind]) for one in together)
