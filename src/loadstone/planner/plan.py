"""The decision: which strategy, how much context, and what each part takes, with the reason for every choice.

Turns a wish and facts into a plan, or into a refusal that says what would fit. Pure arithmetic: no torch,
no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from loadstone.errors import ConfigurationError, ResourceError
from loadstone.hardware import process_rss
from loadstone.hardware.device import Device, MemorySettings
from loadstone.quantization import find_strategy
from loadstone.units import format_size

from .estimate import Estimate, Estimator, cache_tokens

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec
    from loadstone.config import LoadConfig

# Best quality first; a plug-in is used only when asked for by name.
LADDER = ("none", "8bit", "4bit")
# More context than this is kept only when asked for: it costs memory from the start, and few prompts need it.
CONTEXT_UNLESS_ASKED = 4096
SHORTEST_CONTEXT = 512


@dataclass(frozen=True)
class Plan:
    """How a model will be run on a device, and what that takes, in bytes.

    `weight_bytes` is by part ("linear", "lm_head", "embedding", "norm"). `steady_bytes` is the sum of all
    parts while answering, `load_peak_bytes` the most while loading; both are within `allowed_bytes` unless
    the plan was forced.
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


def plan(
    wish: LoadConfig,
    spec: ModelSpec,
    device: Device,
    settings: MemorySettings,
    *,
    runtime_bytes: int,
    resident_bytes: int | None = None,
) -> Plan:
    """Return how `wish` is met for `spec` on `device`, or raise ResourceError saying what would fit.

    `runtime_bytes` is what the process takes on that device besides the model: on the processor its memory
    before the load and an allowance. `resident_bytes` is what it holds there already (measured when None on
    the processor), which counts as used in `device.free_bytes` and is this process's own. Raises
    ConfigurationError for a context that the model does not have.
    """
    if resident_bytes is None:
        resident_bytes = process_rss() if device.kind == "cpu" else 0
    return _Planning(wish, spec, device, settings, runtime_bytes, resident_bytes).decide()


class _Planning:
    """One decision in the making: the wish, the facts, and the estimators of the strategies in question."""

    def __init__(
        self,
        wish: LoadConfig,
        spec: ModelSpec,
        device: Device,
        settings: MemorySettings,
        runtime_bytes: int,
        resident_bytes: int,
    ) -> None:
        self.wish, self.spec, self.device, self.settings = wish, spec, device, settings
        self.allowed, self.allowed_reason = _allowed(wish, device, resident_bytes)
        self.runtime_bytes = runtime_bytes
        self.longest, self.shortest = _contexts(wish, spec)
        self._estimators: dict[str, Estimator] = {}

    def decide(self) -> Plan:
        """Return the plan, forced where that was asked for, or raise ResourceError."""
        asked = None if self.wish.quantization == "auto" else find_strategy(self.wish.quantization).name
        choice = self._fitting(asked, f"quantization {asked}: as asked") if asked else self._best_quality()
        if choice is not None:
            return choice
        wanted = asked or LADDER[-1]
        estimate = self._estimator(wanted).at(self.shortest)
        if self.wish.force and estimate.weights <= self.device.total_bytes:
            return self._forced(wanted, estimate)
        raise self._refusal(wanted, estimate)

    def _best_quality(self) -> Plan | None:
        """Return the best quality that fits with the whole context, else the smallest with less of it."""
        passed: list[str] = []
        for name in LADDER:
            needed = self._estimator(name).at(self.longest).needed_bytes
            if needed <= self.allowed:
                why = f" ({'; '.join(passed)})" if passed else ""
                return self._fitting(name, f"quantization {name}: the best quality that fits{why}")
            passed.append(f"{name} needs {format_size(needed)}")
        return self._fitting(LADDER[-1], f"quantization {LADDER[-1]}: nothing larger fits ({'; '.join(passed)})")

    def _fitting(self, name: str, reason: str) -> Plan | None:
        estimator = self._estimator(name)
        context = estimator.longest(self.allowed, shortest=self.shortest, longest=self.longest)
        if context is None:
            return None
        return self._made(name, context, estimator.at(context), (reason, self._context_reason(context)))

    def _forced(self, name: str, estimate: Estimate) -> Plan:
        reason = (
            f"forced: needs {format_size(estimate.needed_bytes)} and {format_size(self.allowed)} is allowed; "
            "it may run out of memory"
        )
        strategy = f"quantization {name}: {'the smallest' if self.wish.quantization == 'auto' else 'as asked'}"
        asked = "as asked" if self.wish.context is not None else "the shortest, since nothing fits"
        reasons = (reason, strategy, f"context {self.shortest}: {asked}")
        return self._made(name, self.shortest, estimate, reasons, forced=True)

    def _made(
        self, name: str, context: int, estimate: Estimate, reasons: tuple[str, ...], *, forced: bool = False
    ) -> Plan:
        device = f"device {self.device.torch_name}: {self.device.reason or 'as given'}"
        allowed = f"allowed {format_size(self.allowed)}: {self.allowed_reason}"
        return Plan(
            device=self.device,
            strategy=name,
            context=context,
            streams=self.wish.streams,
            settings=self.settings,
            weight_bytes=MappingProxyType(dict(estimate.weight_bytes)),
            kv_bytes=estimate.kv_bytes,
            activation_bytes=estimate.activation_bytes,
            runtime_bytes=estimate.runtime_bytes,
            load_peak_bytes=estimate.load_peak_bytes,
            steady_bytes=estimate.steady_bytes,
            allowed_bytes=self.allowed,
            reasons=(device, *reasons, allowed, *self.settings.reasons),
            forced=forced,
        )

    def _refusal(self, name: str, estimate: Estimate) -> ResourceError:
        fits = self._would_fit(name)
        phase = "to load" if estimate.load_peak_bytes > estimate.steady_bytes else "to answer"
        parts = (
            f"weights {format_size(estimate.weights)}, KV cache {format_size(estimate.kv_bytes)}, working "
            f"memory {format_size(estimate.activation_bytes)}, runtime {format_size(self.runtime_bytes)}"
        )
        message = (
            f"{self.spec.name} with quantization {name} and context {self.shortest} does not fit: it needs "
            f"{format_size(estimate.needed_bytes)} {phase} ({parts}), and {format_size(self.allowed)} is "
            f"allowed ({self.allowed_reason})."
        )
        return ResourceError(
            message,
            needed=estimate.needed_bytes,
            allowed=self.allowed,
            would_fit=fits,
            hint=self._hint(name, estimate, fits),
        )

    def _would_fit(self, refused: str) -> tuple[str, ...]:
        """Return what fits instead: the refused strategy and each smaller one, with its longest context."""
        start = LADDER.index(refused) if refused in LADDER else 0
        names = dict.fromkeys((refused, *LADDER[start:]))
        found = []
        for name in names:
            estimator = self._estimator(name)
            shortest = min(SHORTEST_CONTEXT, self.longest)
            context = estimator.longest(self.allowed, shortest=shortest, longest=self.longest)
            if context is not None:
                needed = format_size(estimator.at(context).needed_bytes)
                found.append(f"quantization {name} with context {context} needs {needed}")
        return tuple(found)

    def _hint(self, name: str, estimate: Estimate, fits: tuple[str, ...]) -> str:
        if fits:
            return f"Would fit: {'; '.join(fits)}. Set quantization and context so, or force to try anyway."
        least = min(self._at_least(step) for step in dict.fromkeys((name, *LADDER)))
        if self.wish.max_memory is not None and self.allowed == self.wish.max_memory:
            return f"Nothing smaller fits either. Raise max_memory to at least {_with_room(least)}."
        if estimate.weights > self.device.total_bytes:
            return (
                f"{self.device.torch_name} has {format_size(self.device.total_bytes)} in all, less than the "
                "weights alone: choose a smaller model or another device; force does not help."
            )
        return (
            f"At least {_with_room(least)} must be free: close other programs, raise the container's memory "
            "limit, lower streams, choose a smaller model, or set force to try anyway."
        )

    def _at_least(self, name: str) -> int:
        return self._estimator(name).at(min(SHORTEST_CONTEXT, self.longest)).needed_bytes

    def _context_reason(self, context: int) -> str:
        if self.wish.context is not None:
            return f"context {context}: as asked"
        most = self.spec.max_context
        if context < self.longest:
            return f"context {context}: as long as fits in {format_size(self.allowed)}"
        if context < most:
            return f"context {context}: the default; the model has {most}, ask for more with context"
        return f"context {context}: all that the model has"

    def _estimator(self, name: str) -> Estimator:
        if name not in self._estimators:
            self._estimators[name] = Estimator(
                self.spec,
                find_strategy(name),
                self.settings,
                device_kind=self.device.kind,
                streams=self.wish.streams,
                runtime_bytes=self.runtime_bytes,
            )
        return self._estimators[name]


def _allowed(wish: LoadConfig, device: Device, resident_bytes: int) -> tuple[int, str]:
    """Return the bytes that may be used, and what says so."""
    available = min(device.free_bytes + resident_bytes, device.total_bytes)
    if wish.max_memory is not None and wish.max_memory <= available:
        return wish.max_memory, "max_memory"
    short = "" if wish.max_memory is None else f", less than max_memory {format_size(wish.max_memory)}"
    return available, f"what {device.torch_name} has for this process{short}"


def _contexts(wish: LoadConfig, spec: ModelSpec) -> tuple[int, int]:
    """Return the longest and the shortest context that meet the wish."""
    if wish.context is not None:
        if wish.context > spec.max_context:
            raise ConfigurationError(
                f"context {wish.context} is longer than {spec.name} has: {spec.max_context}",
                key="model_config.context",
                hint=f"Set context to {spec.max_context} or less.",
            )
        return wish.context, wish.context
    longest = min(spec.max_context, CONTEXT_UNLESS_ASKED)
    return longest, min(SHORTEST_CONTEXT, longest)


def _with_room(size: int) -> str:
    """Name a size that will still do when the process has grown a little, in words that round up."""
    return format_size(size + size // 20 + 10_000_000)
