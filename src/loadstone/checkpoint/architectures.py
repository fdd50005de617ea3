"""The table of architectures that the decoder knows, and how they differ from one another.

Each is the same pre-norm transformer with rotary positions and a gated MLP; what differs is in the fields. A
new architecture of this family is one `register_architecture` call, or an entry point in
`loadstone.architectures`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points


@dataclass(frozen=True)
class Architecture:
    """What sets one family of checkpoints apart.

    `name` is `model_type` in config.json. `qkv_bias` is whether q, k and v have biases (None: config.json's
    `attention_bias` says). `query_key_norm` is an RMS norm over each head of q and k. `sliding_window` tells
    where the window is read: never, always, or only under `use_sliding_window`. `default_head_size` is what
    `head_dim` means when absent (None: hidden_size / heads). `gguf_name` is `general.architecture`;
    `gguf_permutes_rope` marks GGUF files whose q and k rows are reordered for interleaved rotation.
    """

    name: str
    qkv_bias: bool | None = None
    query_key_norm: bool = False
    sliding_window: str = "never"  # never | always | optional
    default_head_size: int | None = None
    gguf_name: str = ""
    gguf_permutes_rope: bool = False


_TABLE: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Make an architecture known; the last registration of a name wins."""
    _TABLE[architecture.name] = architecture


def find_architecture(name: str) -> Architecture | None:
    """Return the architecture called `name` (`model_type`), or None when it is not known."""
    if name not in _TABLE:
        _load_plugins()
    return _TABLE.get(name)


def find_gguf_architecture(gguf_name: str, *, windowed: bool = False) -> Architecture | None:
    """Return the architecture of GGUF files whose `general.architecture` is `gguf_name`, or None.

    GGUF files say "llama" for llama and mistral alike; `windowed` prefers the one that has a sliding window.
    """
    _load_plugins()
    fitting = [one for one in _TABLE.values() if one.gguf_name == gguf_name]
    fitting.sort(key=lambda one: (one.sliding_window == "always") != windowed)  # stable: else as registered
    return fitting[0] if fitting else None


def known_architectures() -> tuple[str, ...]:
    """Return the names that `find_architecture` knows, sorted."""
    _load_plugins()
    return tuple(sorted(_TABLE))


@cache
def _load_plugins() -> None:
    for entry in entry_points(group="loadstone.architectures"):
        plugin = entry.load()  # an Architecture, or what makes one
        architecture = plugin if isinstance(plugin, Architecture) else plugin()
        _TABLE.setdefault(architecture.name, architecture)


for _built_in in (
    Architecture("llama", gguf_name="llama", gguf_permutes_rope=True),
    Architecture("mistral", qkv_bias=False, sliding_window="always", gguf_name="llama", gguf_permutes_rope=True),
    Architecture("qwen2", qkv_bias=True, sliding_window="optional", gguf_name="qwen2"),
    Architecture("qwen3", query_key_norm=True, sliding_window="optional", default_head_size=128, gguf_name="qwen3"),
):
    register_architecture(_built_in)
