"""A load in five calls, each a room of its own: resolve, inspect, plan, build, ready.

Knows one configuration, and what a model that is there already holds; who asks for answers is not known here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from loadstone.checkpoint import inspect, load_chat_template, load_tokenizer, prepare_tokenizers
from loadstone.checkpoint.spec import ModelSpec
from loadstone.checkpoint.template import ChatTemplate
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import ConfigManager
from loadstone.errors import ConfigurationError, ResourceError, is_out_of_memory
from loadstone.folders import cache_folder
from loadstone.hardware import Device, DeviceManager, MemorySettings, may_have_gpu, memory_limits, peak_rss, process_rss
from loadstone.light import light_files, lighten
from loadstone.loaded import LoadedModel, PreparedModel
from loadstone.memory import forget_frames, give_back
from loadstone.planner import Below, Plan, plan, runtime_bytes
from loadstone.planner.accuracy import add_record, allowance_of, kind_of, read_records, record_of
from loadstone.planner.own import kept_name
from loadstone.planner.runtime import LIBRARIES
from loadstone.quantization import AUTO, find_strategy
from loadstone.sources import ModelFiles, resolve
from loadstone.startup import importing_torch
from loadstone.store import Entry, Store, open_store
from loadstone.telemetry import emit, timed
from loadstone.units import format_size


@dataclass(frozen=True)
class Ground:
    """What is there before a load, in bytes.

    `device` holds `held` bytes of a model that the new one takes the place of; in all this process has `process` bytes
    beside it. `settled` is what an earlier plan counted for the process and its runtime: by now most of that is there.
    """

    device: str = "cpu"
    held: int = 0
    process: int | None = None
    settled: int = 0


@dataclass(frozen=True)
class Decided:
    """A load of which all is decided, before any weight is read.

    `phases` are the seconds of its steps so far; `entry` is where the weights are in the store, if that is known.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    template: ChatTemplate | None
    plan: Plan
    phases: Mapping[str, float]
    entry: Entry | None = None


class Loading:
    """Loads what `config` says."""

    def __init__(self, config: ConfigManager, devices: DeviceManager, ground: Ground | None = None) -> None:
        self.config, self._devices, self._ground = config, devices, ground or Ground()
        self._has_weights = False

    def load(self) -> LoadedModel:
        """Return the model, ready to answer."""
        return self.build(self.decide())

    def decide(self) -> Decided:
        """Take the steps of a load that come before any weight is read."""
        phases: dict[str, float] = {}
        _, decided = self._decide(phases)
        return decided

    def build(self, decided: Decided) -> LoadedModel:
        """Take the steps that come after; where memory does not suffice, those of a plan that takes less."""
        while True:
            self._has_weights = False
            try:
                return self._build(decided)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                short = error
            decided = self._step_down(decided, short)

    def _step_down(self, decided: Decided, short: Exception) -> Decided:
        """Return the same load a rung further down the ladder; raise ResourceError where there is none."""
        forget_frames(short)
        give_back()
        try:
            below = Below(decided.plan, in_weights=not self._has_weights)
            lower = self._plan(decided.spec, is_ready=True, below=below)
        except ResourceError as refused:
            raise refused from short
        was, now = decided.plan.summary, lower.summary
        emit("load.step_down", model=decided.spec.name, reason=str(short), was=was, now=now)
        return replace(decided, plan=lower, entry=decided.entry if lower.strategy == decided.plan.strategy else None)

    def _build(self, decided: Decided) -> LoadedModel:
        from loadstone.engine import Engine
        from loadstone.model import build

        phases, decision, peak_before = dict(decided.phases), decided.plan, peak_rss()
        with self._phase("build", phases) as made:
            decoder = build(decision, decided.spec, self.store(), entry=decided.entry)
            made["bytes"] = sum(decoder.weight_bytes().values())
        self._has_weights = True
        with self._phase("ready", phases):
            engine = Engine(decoder, decided.tokenizer, decided.template, decision, self.config.config.engine)
        layers = self.config.generation_layers(decided.spec.generation)
        taken = {**decoder.weight_bytes(), "kv_cache": engine.cache_bytes}
        peak, from_store = peak_rss(), decoder.attached is not None
        record = record_of(
            decided.spec, decision, sum(phases.values()), kind=self._kind(decision.device, decision.settings),
            from_store=from_store, process_peak=peak,
        )  # fmt: skip
        if peak > peak_before and not from_store and decision.device.kind == "cpu":
            record = replace(record, load_peak=peak)
        add_record(cache_folder(), record)
        return LoadedModel(decided.spec, decision, decoder, decided.tokenizer, engine, taken, phases, layers, record)

    def prepare(self, *, keep_original: bool) -> PreparedModel:
        """See that files and quantised weights are on this machine; see `ModelManager.prepare_model`."""
        phases: dict[str, float] = {}
        files, decided = self._decide(phases, may_be_light=not keep_original)
        with self._phase("keep", phases):
            entry, was_made, not_kept = self._keep(decided)
        spec, file_bytes = decided.spec, _bytes_of(files)
        freed = None if keep_original else lighten(self.config.config.model, self.store(), files, spec, entry)
        return PreparedModel(spec, decided.plan, file_bytes, entry, was_made, not_kept, phases, freed)

    def _decide(self, phases: dict[str, float], *, may_be_light: bool = True) -> tuple[ModelFiles, Decided]:
        self._check_wish()
        self._check_room_for_libraries()
        with self._phase("resolve", phases) as found:
            files = self.resolve(may_be_light=may_be_light)
            found["bytes"] = _bytes_of(files)
        prepare_tokenizers()
        with self._phase("inspect", phases), importing_torch() as torch_is_there:
            spec = inspect(files).leaving_alone(self.config.config.model.left_alone)
            tokenizer, template = load_tokenizer(spec), load_chat_template(spec)  # or the long work were in vain
            torch_is_there()
        with self._phase("plan", phases) as told:
            decision = self._plan(spec, is_ready=True)
            told |= {"needed": decision.needed_bytes, "allowed": decision.allowed_bytes, "likely": decision.likely}
        return files, Decided(spec, tokenizer, template, decision, phases)

    def _keep(self, decided: Decided) -> tuple[Entry | None, bool, str | None]:
        """Return the store's entry for a plan and whether it was made now, or why there is none."""
        from loadstone.model import can_be_kept, keep

        store = self.store()
        if not can_be_kept(decided.plan):
            return None, False, f"{decided.plan.strategy} has no quantised form to keep"
        if store is None:
            return None, False, f"the store is switched off ({self.config.origin('store.enabled')})"
        return *keep(decided.plan, decided.spec, store), None

    def resolve(self, *, may_be_light: bool = True) -> ModelFiles:
        """Return the configured model's files; see `ModelManager.resolve`."""
        wish = self.config.config.model
        if may_be_light and (light := light_files(wish, self.store())) is not None:
            return light
        return resolve(wish.base_model, revision=wish.revision, offline=wish.offline, retry=self.config.config.retry)

    def plan(self, spec: ModelSpec | None = None) -> Plan:
        """Return how the model would be loaded here, in the place of one that is there already."""
        with importing_torch() as torch_is_there:  # looking for a GPU takes it, and its memory counts
            spec = (spec or inspect(self.resolve())).leaving_alone(self.config.config.model.left_alone)
            torch_is_there()
        return self._plan(spec, is_ready=self._ground.settled > 0)  # who has loaded before has all but the model

    def _plan(self, spec: ModelSpec, *, is_ready: bool, below: Below | None = None) -> Plan:
        """Return the plan; `is_ready` says that torch and the tokenizer are there, `below` what was too much."""
        wish, store = self.config.config.model, self.store()
        device = self._devices.resolve(wish.device, require=wish.require)
        settings = self._devices.optimize_memory_settings(device, compute_dtype=wish.compute_dtype)
        has_kernels = True
        if is_ready and device.kind == "cpu":
            from loadstone.quantization.kernels.cpu import cpu_kernels

            has_kernels = cpu_kernels() is not None  # brought in now, so that what they take is seen
        ground, resident = self._ground, process_rss() if device.kind == "cpu" else 0
        process = resident if ground.process is None else ground.process
        learned = allowance_of(read_records(cache_folder()), self._kind(device, settings))
        runtime = runtime_bytes(
            spec, device.kind, process, is_ready=is_ready, has_kernels=has_kernels, rest=learned.bytes
        )  # fmt: skip
        if device.kind == "cpu":
            runtime = max(process, ground.settled or runtime)
        elif device.torch_name == ground.device:
            resident = ground.held

        def is_kept(strategy: str) -> bool:
            return store is not None and store.has(spec, kept_name(spec, strategy))

        return plan(
            wish, spec, device, settings,
            runtime_bytes=runtime, resident_bytes=resident, is_kept=is_kept, has_kernels=has_kernels, below=below,
            learned=learned,
        )  # fmt: skip

    def _kind(self, device: Device, settings: MemorySettings) -> str:
        return kind_of(device, settings, again=self._ground.settled > 0)

    def store(self) -> Store | None:
        """Return the configured store, or None where it is switched off."""
        return open_store(self.config.config.store)

    def _check_wish(self) -> None:
        """Refuse, before anything is fetched, what no model's files could make right."""
        wish = self.config.config.model
        with self._naming("model_config.quantization"):
            if wish.strategy != AUTO:
                find_strategy(wish.strategy)
        if wish.device != AUTO or wish.require:  # auto is always right, and looking for a GPU takes torch
            with self._naming("model_config.device" if wish.require is None else "model_config.require"):
                self._devices.resolve(wish.device, require=wish.require)

    def _check_room_for_libraries(self) -> None:
        """Refuse what not even the libraries fit in, before they are brought in: the system would end the process."""
        if "torch" in sys.modules:
            return
        wish = self.config.config.model
        allowed, which = memory_limits().free_bytes + process_rss(), "what this process may have"
        is_cpu = wish.device == "cpu" or (wish.device == AUTO and not may_have_gpu())
        if is_cpu and wish.max_memory is not None and wish.max_memory < allowed:
            allowed, which = wish.max_memory, "max_memory"
        if allowed < LIBRARIES and not wish.force:
            raise ResourceError(
                f"Python with torch takes {format_size(LIBRARIES)} without any model, and {format_size(allowed)} is "
                f"allowed ({which}).",
                needed=LIBRARIES,
                allowed=allowed,
                hint="Allow more: raise max_memory, or the limit of the container or of ulimit.",
            )

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Say of a refused setting where it was set."""
        try:
            yield
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.config.origin(key)}: {error.message}", key=key, hint=error.hint) from error

    @contextmanager
    def _phase(self, name: str, phases: dict[str, float]) -> Iterator[dict[str, Any]]:
        started = time.perf_counter()
        model = self.config.config.model.base_model
        with timed(f"load.{name}", model=model, phase=name, rss=process_rss()) as more:
            yield more
        phases[name] = time.perf_counter() - started


def _bytes_of(files: ModelFiles) -> int:
    return sum(file.stat().st_size for file in files.weights)
