"""What is decided: which strategy, how much context, and what each part takes, with the reason for every choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loadstone.hardware.device import Device, MemorySettings
from loadstone.units import format_size, format_spread

from .estimate import cache_tokens
from .runtime import NOTHING_LEARNED, Allowance


@dataclass(frozen=True)
class Plan:
    """How a model will be run on a device, and what that takes, in bytes.

    `weight_bytes` is by part ("linear", "lm_head", "embedding", "norm"). `steady_bytes` is the sum of all
    parts while answering, `load_peak_bytes` the most while loading; both are within `allowed_bytes` unless
    the plan was forced. `learned` is what earlier loads taught: it is in `runtime_bytes`.
    """

    device: Device
    strategy: str
    context: int
    streams: int
    settings: MemorySettings
    weight_bytes: Mapping[str, int]
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int
    load_peak_bytes: int
    steady_bytes: int
    allowed_bytes: int
    reasons: tuple[str, ...] = ()
    forced: bool = False
    learned: Allowance = NOTHING_LEARNED

    @property
    def summary(self) -> str:
        """How the model is run, in a few words."""
        return (
            f"{self.strategy}, context {self.context}, {self.streams} stream(s), {self.settings.prefill_chunk} prompt "
            f"tokens at a time ({format_size(self.needed_bytes)})"
        )

    @property
    def cache_tokens(self) -> int:
        """How many tokens the KV cache has places for."""
        return cache_tokens(self.context, self.streams)

    @property
    def other_bytes(self) -> dict[str, int]:
        """Return the bytes beside the weights, the totals, and what is allowed, by name."""
        return {
            "kv_cache": self.kv_bytes,
            "activations": self.activation_bytes,
            "runtime": self.runtime_bytes,
            "load_peak": self.load_peak_bytes,
            "steady": self.steady_bytes,
            "allowed": self.allowed_bytes,
        }

    @property
    def needed_bytes(self) -> int:
        """The most at any time: loading or answering, whichever takes more."""
        return max(self.load_peak_bytes, self.steady_bytes)

    @property
    def likely_bytes(self) -> tuple[int, int] | None:
        """Between what the most at any time will be, as earlier loads have it; None before there were enough."""
        if not self.learned.loads:
            return None
        least, most = self.learned.too_high
        return self.needed_bytes - most, self.needed_bytes - least

    @property
    def likely(self) -> str:
        """The same for people: "5.1 ± 0.1 GB, from 7 loads"; before there were enough, what is planned for."""
        if self.likely_bytes is None:
            return f"at most {format_size(self.needed_bytes)}, before any loads to learn from"
        return f"{format_spread(*self.likely_bytes)}, from {self.learned.loads} loads"
