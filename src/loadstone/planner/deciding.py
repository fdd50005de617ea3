"""The decision: a wish and facts become a plan, or a refusal that says what would fit. Pure arithmetic: no torch.

Where memory does not suffice for a plan after all, the next one is a rung further down the ladder: never the same
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from loadstone.errors import ConfigurationError
from loadstone.hardware import process_rss
from loadstone.hardware.device import Device, MemorySettings
from loadstone.quantization import AUTO, find_strategy
from loadstone.units import format_size

from .estimate import Estimate, Estimator
from .ladder import CONTEXT_UNLESS_ASKED, SHORTEST_CONTEXT, SMALLEST_CHUNK, Below, Way, ladder_of, smaller
from .own import NEAREST, own_strategy
from .plan import Plan
from .refusal import refusal
from .runtime import NOTHING_LEARNED, Allowance

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec
    from loadstone.config import LoadConfig


def plan(
    wish: LoadConfig,
    spec: ModelSpec,
    device: Device,
    settings: MemorySettings,
    *,
    runtime_bytes: int,
    resident_bytes: int | None = None,
    is_kept: Callable[[str], bool] = lambda strategy: False,
    has_kernels: bool = True,
    below: Below | None = None,
    strategy: str | None = None,
    learned: Allowance = NOTHING_LEARNED,
) -> Plan:
    """Return how `wish` is met for `spec` on `device`, or raise ResourceError saying what would fit.

    `runtime_bytes` is what the process takes on that device besides the model: on the processor its memory
    before the load and an allowance. `resident_bytes` is what it holds there already (measured when None on
    the processor), which counts as used in `device.free_bytes` and is this process's own. `is_kept` tells whether the
    store has the weights in a strategy already, so that loading needs no memory beside them, and `has_kernels` whether
    our own products can be had on this processor. `below` names a plan that memory did not suffice for: what is
    returned then takes less. `strategy` is to be planned for whatever the wish says of quantization. `learned` is what
    earlier loads taught, and is in `runtime_bytes`. Raises ConfigurationError for a context that the model has not.
    """
    if resident_bytes is None:
        resident_bytes = process_rss() if device.kind == "cpu" else 0
    deciding = Deciding(
        wish, spec, device, settings, runtime_bytes, resident_bytes, is_kept, learned, strategy, has_kernels=has_kernels
    )
    return deciding.decide() if below is None else deciding.step_down(below)


class Deciding:
    """One decision in the making: the wish, the facts, and the estimators of the ways in question."""

    def __init__(
        self,
        wish: LoadConfig,
        spec: ModelSpec,
        device: Device,
        settings: MemorySettings,
        runtime_bytes: int,
        resident_bytes: int,
        is_kept: Callable[[str], bool],
        learned: Allowance,
        strategy: str | None = None,
        *,
        has_kernels: bool = True,
    ) -> None:
        self.wish, self.spec, self.device, self.settings = wish, spec, device, settings
        self.allowed, self.allowed_reason = allowed_for(wish, device, resident_bytes)
        self.runtime_bytes = runtime_bytes
        self._learned = learned
        self._is_kept = cache(is_kept)
        ladder, self._why_integers = ladder_of(device, has_kernels=has_kernels)
        self.longest, self.shortest = _contexts(wish, spec)
        self._estimators: dict[Way, Estimator] = {}
        self.own = own_strategy(spec)
        self.asked, self._asked_reason = self._asked(strategy)
        self.ladder = ladder if self.own is None else (self.own, *_below(self.own, ladder))

    def _asked(self, strategy: str | None) -> tuple[str | None, str]:
        """Return the strategy that was asked for, None where it is to be chosen, and what is said of that.

        Weights that are quantised already stay in their own form unless somebody asked for another. "4bit" is met by
        every form of 4 bits; who means NF4 says `nf4`.
        """
        wish = self.wish
        if strategy is not None:
            return strategy, "as asked"
        if wish.strategy == AUTO:
            return None, ""
        asked, quantized = find_strategy(wish.strategy).name, self.spec.quantized
        if quantized is None or self.own is None:
            faster = f"; int4 is faster here: {self._why_integers}" if asked == "4bit" and self._why_integers else ""
            return asked, f"as asked{faster}"
        if not wish.says("quantization"):
            return None, ""
        if asked == self.own or (wish.strategy == "4bit" and quantized.bits == 4 and self.own != NEAREST):
            return self.own, f"as asked, the form of the checkpoint ({quantized.summary})"
        return asked, f"as asked; the checkpoint has {quantized.summary}, and another form is no better than that"

    def decide(self) -> Plan:
        """Return the plan, forced where that was asked for, or raise ResourceError."""
        if self.asked is not None:
            choice = self._fitting(self.asked, f"quantization {self.asked}: {self._asked_reason}")
        else:
            choice = self._best_quality() if self.own is None else self._own_form(self.own)
        if choice is not None:
            return choice
        wanted = self.asked or self.ladder[-1]
        way = self.least(wanted)
        estimate = self.estimator(way).at(self.shortest)
        if self.wish.force and estimate.weights <= self.device.total_bytes:
            return self._forced(way, estimate)
        raise refusal(self, way)

    def step_down(self, below: Below) -> Plan:
        """Return the next rung below a plan that memory did not suffice for, or raise ResourceError.

        First prompts are read in smaller chunks, then fewer streams are served, then the context is shorter unless it
        was asked for, then the quantization is stronger where it is `auto`. Where the weights alone were too much, the
        last is the only rung.
        """
        plan = below.plan
        if self.allowed >= plan.needed_bytes:
            self.allowed = plan.needed_bytes - 1
            self.allowed_reason = f"less than the {format_size(plan.needed_bytes)} that memory did not suffice for"
        for way, context in () if below.in_weights else self._rungs(plan):
            estimate = self.estimator(way).at(context)
            if self.fits(estimate):
                return self._made(way, context, estimate, self._reasons_down(way, context))
        if self.asked is None and plan.strategy in self.ladder:
            for name in self.ladder[self.ladder.index(plan.strategy) + 1 :]:
                choice = self._fitting(name, f"quantization {name}: memory did not suffice for {plan.strategy}")
                if choice is not None:
                    return choice
        raise refusal(self, replace(self.least(plan.strategy), streams=1))

    def _rungs(self, plan: Plan) -> Iterator[tuple[Way, int]]:
        """Yield the ways to keep a plan's strategy in less memory, with their contexts; the least loss comes first."""
        way = Way(plan.strategy, plan.settings.prefill_chunk, plan.streams)
        yield from ((replace(way, chunk=chunk), plan.context) for chunk in smaller(way.chunk, SMALLEST_CHUNK))
        least = replace(way, chunk=min(way.chunk, SMALLEST_CHUNK))
        yield from ((replace(least, streams=streams), plan.context) for streams in smaller(way.streams, 1))
        yield from ((replace(least, streams=1), context) for context in smaller(plan.context, self.shortest))

    def _reasons_down(self, way: Way, context: int) -> tuple[str, ...]:
        return (
            f"quantization {way.strategy}: as before",
            f"context {context}, {way.streams} stream(s), {way.chunk} prompt tokens at a time: a step down, since "
            "memory turned out shorter than planned",
        )

    def _own_form(self, own: str) -> Plan | None:
        """Return the form that a checkpoint has already, and only where it does not fit one that takes less."""
        assert self.spec.quantized is not None
        reason = f"the form of the checkpoint ({self.spec.quantized.summary}), or nearest to it"
        for name in self.ladder:
            if (choice := self._fitting(name, f"quantization {name}: {reason}")) is not None:
                return choice
            reason = f"{own}, the form of the checkpoint, does not fit"
        return None

    def _best_quality(self) -> Plan | None:
        """Return the best quality that fits with the whole context, else the smallest with less of it."""
        passed: list[str] = []
        for name in self.ladder:
            why = f" ({'; '.join(passed)})" if passed else ""
            why += f"; {self._why_integers}" if name == "int4" else ""
            choice = self._fitting(name, f"quantization {name}: the best quality that fits{why}", self.longest)
            if choice is not None:
                return choice
            needed = self.estimator(self.least(name)).at(self.longest).needed_bytes
            passed.append(f"{name} needs {format_size(needed)}")
        last = self.ladder[-1]
        return self._fitting(last, f"quantization {last}: nothing larger fits ({'; '.join(passed)})")

    def _fitting(self, name: str, reason: str, shortest: int | None = None) -> Plan | None:
        found = self.find(name, shortest or self.shortest)
        if found is None:
            return None
        way, context = found
        reasons: tuple[str, ...] = (reason, self._context_reason(context))
        if way.chunk < self.settings.prefill_chunk:
            reasons = (*reasons, f"{way.chunk} prompt tokens at a time: more would not fit")
        return self._made(way, context, self.estimator(way).at(context), reasons)

    def find(self, name: str, shortest: int) -> tuple[Way, int] | None:
        """Return how a strategy fits with the longest context, and this context; None where not even `shortest` does.

        Long contexts need more memory for each token that is read with others, so chunks are made smaller first.
        """
        chunk = self.settings.prefill_chunk
        for less in (chunk, *smaller(chunk, SMALLEST_CHUNK)):
            way = Way(name, less, self.wish.streams)
            if self.fits(self.estimator(way).at(self.longest)):
                return way, self.longest
        way = self.least(name)
        context = self.estimator(way).longest(self.fits, shortest=shortest, longest=self.longest)
        return None if context is None else (way, context)

    def fits(self, estimate: Estimate) -> bool:
        """Tell whether there is memory enough, and none of its pieces larger than the device takes."""
        return estimate.needed_bytes <= self.allowed and not self.too_large(estimate)

    def too_large(self, estimate: Estimate) -> bool:
        """Tell whether one of the pieces is larger than the device takes, whatever it has in all."""
        most = self.device.largest_buffer_bytes
        return most is not None and estimate.largest_buffer[1] > most

    def least(self, name: str) -> Way:
        """Return a strategy in the least memory that keeps what was asked for."""
        return Way(name, min(self.settings.prefill_chunk, SMALLEST_CHUNK), self.wish.streams)

    def _forced(self, way: Way, estimate: Estimate) -> Plan:
        reason = (
            f"forced: needs {format_size(estimate.needed_bytes)} and {format_size(self.allowed)} is allowed; "
            "it may run out of memory"
        )
        if estimate.needed_bytes <= self.allowed:
            piece, size = estimate.largest_buffer
            reason = f"forced: {piece} would take {format_size(size)} in one piece, which may be refused"
        strategy = f"quantization {way.strategy}: {'the smallest' if self.asked is None else 'as asked'}"
        asked = "as asked" if isinstance(self.wish.context, int) else "the shortest, since nothing fits"
        reasons = (reason, strategy, f"context {self.shortest}: {asked}")
        return self._made(way, self.shortest, estimate, reasons, forced=True)

    def _made(
        self, way: Way, context: int, estimate: Estimate, reasons: tuple[str, ...], *, forced: bool = False
    ) -> Plan:
        device = f"device {self.device.torch_name}: {self.device.reason or 'as given'}"
        allowed = [f"allowed {format_size(self.allowed)}: {self.allowed_reason}"]
        if (most := self.device.largest_buffer_bytes) is not None:
            allowed.append(f"no tensor above {format_size(most)}: as much as one buffer of {self.device.kind} may have")
        return Plan(
            device=self.device,
            strategy=way.strategy,
            context=context,
            streams=way.streams,
            settings=replace(self.settings, prefill_chunk=way.chunk),
            weight_bytes=MappingProxyType(dict(estimate.weight_bytes)),
            kv_bytes=estimate.kv_bytes,
            activation_bytes=estimate.activation_bytes,
            runtime_bytes=estimate.runtime_bytes,
            load_peak_bytes=estimate.load_peak_bytes,
            steady_bytes=estimate.steady_bytes,
            allowed_bytes=self.allowed,
            reasons=(device, *reasons, *self._differences(), *allowed, *self.settings.reasons),
            forced=forced,
            learned=self._learned,
        )

    def _differences(self) -> Iterator[str]:
        """Yield what is done otherwise than a mapping of quantization asks for, and what is left alone."""
        asked = self.wish.quantization
        if isinstance(asked, str):
            return
        yield from asked.differences(self.device.kind)
        for module in asked.llm_int8_skip_modules:
            if not self.spec.leaving_alone([module]).left_alone:
                yield f"llm_int8_skip_modules: {module!r} is no matrix of this model"
        if self.spec.left_alone:
            yield f"{len(self.spec.left_alone)} matrices are left as they are (llm_int8_skip_modules)"

    def _context_reason(self, context: int) -> str:
        if isinstance(self.wish.context, int):
            return f"context {context}: as asked"
        most = self.spec.max_context
        if context < self.longest:
            return f"context {context}: as long as fits in {format_size(self.allowed)}"
        if context < most:
            return f"context {context}: the default; the model has {most}, ask for more with context"
        return f"context {context}: all that the model has"

    def estimator(self, way: Way) -> Estimator:
        """Return what tells the bytes of a way."""
        if way not in self._estimators:
            self._estimators[way] = Estimator(
                self.spec,
                find_strategy(way.strategy),
                replace(self.settings, prefill_chunk=way.chunk),
                device_kind=self.device.kind,
                streams=way.streams,
                runtime_bytes=self.runtime_bytes,
                is_kept=self._is_kept(way.strategy),
            )
        return self._estimators[way]


def _below(strategy: str, ladder: tuple[str, ...]) -> tuple[str, ...]:
    """Return the strategies of a ladder that take less than this one."""
    return ladder[ladder.index(strategy) + 1 :] if strategy in ladder else ()


def allowed_for(wish: LoadConfig, device: Device, resident_bytes: int) -> tuple[int, str]:
    """Return the bytes that may be used, and what says so; `resident_bytes` are this process's already."""
    available = min(device.free_bytes + resident_bytes, device.total_bytes)
    if wish.max_memory is not None and wish.max_memory <= available:
        return wish.max_memory, "max_memory"
    short = "" if wish.max_memory is None else f", less than max_memory {format_size(wish.max_memory)}"
    return available, f"what {device.torch_name} has for this process{short}"


def _contexts(wish: LoadConfig, spec: ModelSpec) -> tuple[int, int]:
    """Return the longest and the shortest context that meet the wish."""
    if isinstance(wish.context, int):
        if wish.context > spec.max_context:
            raise ConfigurationError(
                f"context {wish.context} is longer than {spec.name} has: {spec.max_context}",
                key="model_config.context",
                hint=f"Set context to {spec.max_context} or less.",
            )
        return wish.context, wish.context
    longest = spec.max_context if wish.context == AUTO else min(spec.max_context, CONTEXT_UNLESS_ASKED)
    return longest, min(SHORTEST_CONTEXT, longest)
