"""What can be asked for, setting by setting: which model, where, in how much memory, and how hard to try.

Knows the form of each value, not whether this machine can grant it: whether a device exists or a strategy is
known is found out by the rooms that look.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from loadstone.units import parse_duration, parse_size

from .bits_and_bytes import BitsAndBytes, bits_and_bytes
from .generation import GenerationConfig
from .wish import Wish, show

_DEVICE = re.compile(r"[a-z]+(:(0|[1-9][0-9]{0,3}))?")
_STRATEGY = re.compile(r"[a-z0-9_-]+")
_TOKENS = re.compile(r"([0-9]{1,12}) ?([km]?)", re.IGNORECASE)
_LARGEST_BYTES = 2**63 - 1
FOREVER = "forever"


class LoadConfig(Wish):
    """Which model to load, where to, and within which limits (`model_config` in a file)."""

    base_model: str = Field(default="Qwen/Qwen2.5-7B-Instruct", examples=['"Qwen/Qwen2.5-7B-Instruct"'])
    """The model: a folder, a .safetensors or .gguf file, a Hub id (`owner/name`, `owner/name@revision`), a name of
    another source (`modelscope:owner/name`, `https://host/folder/`, `s3://bucket/folder`, a plug-in's), or
    `smollm2`. Qwen2.5-7B-Instruct by default: it answers well in English and Chinese, is openly licensed,
    and takes about 5 GB in 4 bits."""

    revision: str | None = Field(default=None, min_length=1, examples=['"main"'])
    """The branch, tag or commit on a hub; None is the newest of the main branch. Fix it where answers must
    not change under you."""

    device: str = Field(default="auto", examples=['"cuda:1"'])
    """Where to load it: `auto`, `cpu`, `cuda` (NVIDIA's, and AMD's where torch is built for ROCm), `cuda:1`, `xpu`
    (Intel's), `mps`, `mps:0`, or a plug-in's name. `auto` by default: the best device here, with the reason told."""

    require: str | None = Field(default=None, examples=['"cuda"'])
    """The only kind of device that will do: `cuda`, `xpu`, `mps`, `cpu` or a plug-in's. Where it is not there loading
    fails instead of falling back. None by default: the best that is there."""

    max_memory: int | None = Field(default=None, examples=['"20GB"'])
    """The most memory that weights, KV cache and working space may take together, in bytes; written as
    `20GB` (10⁹) or `20GiB` (2³⁰). None by default: what the device really has free, container limits
    included."""

    quantization: str | BitsAndBytes = Field(default="4bit", examples=['"4bit"'])
    """How weights are kept: `none`, `8bit`, `4bit` (also `nf4`), `int4`, `auto`, or a plug-in's name; empty is `none`.
    Also a mapping with the fields of transformers' BitsAndBytesConfig, or one itself. `4bit` by default: a quarter of
    the memory, and so about four times the speed, for little loss. A checkpoint that is quantised already keeps its
    own form unless this is set; any form of 4 bits is `4bit`, and only NF4 is `nf4`."""

    context: Annotated[int, Field(ge=1, le=2**31)] | Literal["auto"] | None = Field(default=None, examples=["32k"])
    """The most tokens that one conversation may have, prompt and answer; `32k` is 32 × 1024, and `auto` as long as
    fits and the model was trained for. None by default: as long as fits, at most 4096, since the KV cache is reserved
    for it."""

    streams: int = Field(default=1, ge=1, le=4096, examples=["4"])
    """How many conversations are answered at the same time; each reserves its own KV cache, so one by
    default."""

    force: bool = Field(default=False, examples=["true"])
    """Whether to load even where the arithmetic says that it does not fit. Off by default: the system would
    end the process without a word."""

    offline: bool = Field(default=False, examples=["true"])
    """Whether to use only what is on this machine, without asking the network. Off by default."""

    @field_validator("base_model", mode="before")
    @classmethod
    def _base_model(cls, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str) and not value.strip():
            raise ValueError("it names no model; write a folder, a file or a Hub id")
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _device(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name = value.strip().lower()
        kind = name.partition(":")[0]
        if not _DEVICE.fullmatch(name):
            raise ValueError(f"{show(value)} is not a device; write auto, cpu, cuda, cuda:1, mps or mps:0")
        if ":" in name and (kind in ("auto", "cpu") or (kind == "mps" and name != "mps:0")):
            only = "mps or mps:0" if kind == "mps" else kind
            raise ValueError(f"{show(value)}: there is only one {kind}; write {only}")
        return name

    @field_validator("require", mode="before")
    @classmethod
    def _require(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name = value.strip().lower()
        if name == "auto" or ":" in name or not _DEVICE.fullmatch(name):
            raise ValueError(f"{show(value)} is not a kind of device; write cuda, xpu, mps or cpu")
        return name

    @field_validator("max_memory", mode="before")
    @classmethod
    def _max_memory(cls, value: Any) -> Any:
        return _size(value)

    @field_validator("quantization", mode="before")
    @classmethod
    def _quantization(cls, value: Any) -> Any:
        if value is None:
            return "none"
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            return value if isinstance(value, BitsAndBytes) else bits_and_bytes(value)
        name = value.strip().lower()
        if not _STRATEGY.fullmatch(name):
            raise ValueError(f"{show(value)} is not the name of a strategy; write none, 8bit, 4bit, int4 or auto")
        if name in ("4", "8"):
            return f"{name}bit"
        if name.lstrip("-").isdigit():
            raise ValueError(f"{show(value)}: weights are kept in 4 or 8 bits; write 4bit, 8bit or none")
        return name

    @property
    def strategy(self) -> str:
        """The name of the strategy that `quantization` means, or `auto`."""
        return self.quantization if isinstance(self.quantization, str) else self.quantization.strategy

    @property
    def left_alone(self) -> tuple[str, ...]:
        """The modules that are not to be quantised."""
        return () if isinstance(self.quantization, str) else self.quantization.llm_int8_skip_modules

    @property
    def compute_dtype(self) -> str | None:
        """The type that products are to be made in, where somebody says."""
        return None if isinstance(self.quantization, str) else self.quantization.bnb_4bit_compute_dtype

    @field_validator("context", mode="before")
    @classmethod
    def _context(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.strip().lower() == "auto":
            return "auto"
        match = _TOKENS.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{show(value)} is not a number of tokens; write one like 4096 or 32k")
        # A context of 32k means 32,768 wherever models are named, so k is 1024 here.
        return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


class RetryConfig(Wish):
    """How often, and after which waits, what failed for a passing reason is tried again (`retry` in a
    file)."""

    max_attempts: int = Field(default=3, ge=1, le=100, examples=["3"])
    """How often one action is tried in all; 1 is never again. Three by default: most hiccups are over by
    then."""

    first_wait: float = Field(default=1.0, ge=0, le=86_400, allow_inf_nan=False, examples=["1.0"])
    """Seconds before the second try; each later wait is longer. One by default: long enough for a restart of
    a proxy, short enough not to be noticed."""

    max_wait: float = Field(default=30.0, ge=0, le=86_400, allow_inf_nan=False, examples=["30.0"])
    """Seconds that no wait may exceed. Thirty by default: longer looks like a program that hangs."""


class StoreConfig(Wish):
    """Where quantised weights are kept, and how much of them (`store` in a file)."""

    enabled: bool = Field(default=True, examples=["true"])
    """Whether quantised weights are kept on disk, so that every load after the first takes no time. On by default."""

    folder: str | None = Field(default=None, min_length=1, examples=['"/data/loadstone"'])
    """The folder that they are kept in; `~` is the home folder. None by default: `store` in the platform's cache
    folder."""

    max_size: int | None = Field(default=None, examples=['"50GB"'])
    """The most that they may take on disk together, in bytes; written as `50GB` or `50GiB`. When a new one does not
    fit, those used longest ago go. None by default: as much as the disk has."""

    @field_validator("folder", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("max_size", mode="before")
    @classmethod
    def _max_size(cls, value: Any) -> Any:
        return _size(value)


class EngineConfig(Wish):
    """How requests are served together (`engine` in a file)."""

    prefix_reuse: bool = Field(default=True, examples=["true"])
    """Whether what a prompt has in common with earlier ones stays in the KV cache, as long as there is room, and is not
    read again. On by default: a conversation's next turn begins at once."""

    speculation: bool = Field(default=True, examples=["true"])
    """Whether several tokens are computed in one step where the text seems to repeat what came before, as answers that
    quote do. On by default: answers are the same, and what does not pay is left by itself."""

    queue: int = Field(default=1024, ge=1, le=10_000_000, examples=["1024"])
    """How many requests may wait for their turn; one more is refused with QueueFullError, where `generate_batch`
    waits itself. 1024 by default: who comes later would wait too long to be glad of the answer."""

    keep_alive: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False, examples=['"5m"'])
    """How long a model stays in memory without a request, in seconds; written as `300`, `5m`, `2h` or `forever`. After
    that it is let go of, and the next request loads it again; 0 lets it go as soon as it has answered. None, which is
    `forever`, by default: a program that loads a model means to use it."""

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _keep_alive(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return None if value == -1 else value
        return None if value.strip().lower() in (FOREVER, "-1") else parse_duration(value)


class LoadstoneConfig(Wish):
    """Everything that can be asked for: one group a section of the file."""

    # Not strict, so that a section may be given as a mapping; the sections themselves are.
    model_config = ConfigDict(strict=False, validate_by_name=True, validate_by_alias=True)

    # pydantic keeps the name `model_config` for itself, so the section's name is an alias.
    model: LoadConfig = Field(
        default_factory=LoadConfig, validation_alias="model_config", serialization_alias="model_config"
    )
    """Which model, where, within which limits; `model_config` in files, variables and mappings."""

    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    """How answers are made where neither the call nor anything later says otherwise."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How requests are served together."""

    retry: RetryConfig = Field(default_factory=RetryConfig)
    """How hard to try when the network fails."""

    store: StoreConfig = Field(default_factory=StoreConfig)
    """Where quantised weights are kept."""


SECTIONS: dict[str, tuple[str, type[Wish]]] = {
    "model_config": ("model", LoadConfig),
    "generation": ("generation", GenerationConfig),
    "engine": ("engine", EngineConfig),
    "retry": ("retry", RetryConfig),
    "store": ("store", StoreConfig),
}
"""Each section's name in files, with the attribute of LoadstoneConfig and the type that it becomes."""


def _size(value: Any) -> Any:
    """Return the bytes that a size means; raise ValueError for what is none."""
    if value is None:
        return None
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise ValueError(f"{show(value)} is not a size; write one like 20GB or 16GiB")
    try:
        size = parse_size(value)
    except OverflowError:
        size = _LARGEST_BYTES + 1
    if size > _LARGEST_BYTES:
        raise ValueError(f"{show(value)} is more than any machine has")
    return size


def known_keys() -> list[str]:
    """Return every setting's dotted key, in the order of the schema."""
    return [f"{section}.{key}" for section, (_, wish) in SECTIONS.items() for key in wish.model_fields]
