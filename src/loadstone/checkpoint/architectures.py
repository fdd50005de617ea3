"""The table of architectures that the decoder knows, and how they differ from one another.

Each is the same pre-norm transformer with rotary positions and a gated MLP; what differs is in the fields. A
new architecture of this family is one `register_architecture` call, or an entry point in
`loadstone.architectures` with the architecture's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadstone.plugins import Door, made


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


LLAMA = Architecture("llama", gguf_name="llama", gguf_permutes_rope=True)
MISTRAL = Architecture("mistral", qkv_bias=False, sliding_window="always", gguf_name="llama", gguf_permutes_rope=True)
QWEN2 = Architecture("qwen2", qkv_bias=True, sliding_window="optional", gguf_name="qwen2")
QWEN3 = Architecture(
    "qwen3", query_key_norm=True, sliding_window="optional", default_head_size=128, gguf_name="qwen3"
)  # fmt: skip

ARCHITECTURES: Door[Architecture] = Door(
    "loadstone.architectures",
    {name.lower(): f"{__name__}:{name}" for name in ("LLAMA", "MISTRAL", "QWEN2", "QWEN3")},
    lambda name, found: made(found, Architecture, name),
)


def register_architecture(architecture: Architecture) -> None:
    """Make an architecture known; the last registration of a name wins."""
    ARCHITECTURES.register(architecture.name, architecture)


def find_architecture(name: str) -> Architecture | None:
    """Return the architecture called `name` (`model_type`), or None when it is not known.

    Raises ConfigurationError when the plug-in that has it is broken.
    """
    return ARCHITECTURES.find(name)


def find_gguf_architecture(gguf_name: str, *, windowed: bool = False) -> Architecture | None:
    """Return the architecture of GGUF files whose `general.architecture` is `gguf_name`, or None.

    GGUF files say "llama" for llama and mistral alike; `windowed` prefers the one that has a sliding window.
    """
    fitting = [one for one in ARCHITECTURES.all().values() if one.gguf_name == gguf_name]
    fitting.sort(key=lambda one: (one.sliding_window == "always") != windowed)  # stable: else built-ins first
    return fitting[0] if fitting else None


def known_architectures() -> tuple[str, ...]:
    """Return the names that `find_architecture` knows, sorted."""
    return tuple(sorted(ARCHITECTURES.names()))
