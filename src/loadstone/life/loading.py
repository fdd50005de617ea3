"""A load in five calls, each a room of its own: resolve, inspect, plan, build, ready.

Knows one configuration, and what a model that is there already holds; who asks for answers is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from loadstone.checkpoint import inspect, load_chat_template, load_tokenizer, prepare_tokenizers
from loadstone.checkpoint.spec import ModelSpec
from loadstone.checkpoint.template import ChatTemplate
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import ConfigManager
from loadstone.errors import ConfigurationError
from loadstone.hardware import DeviceManager, process_rss
from loadstone.light import light_files, lighten
from loadstone.loaded import LoadedModel, PreparedModel
from loadstone.planner import Plan, plan
from loadstone.planner.runtime import RUNTIME_ALLOWANCE
from loadstone.quantization import AUTO, find_strategy
from loadstone.sources import ModelFiles, resolve
from loadstone.startup import importing_torch
from loadstone.store import Entry, Store, open_store
from loadstone.telemetry import timed


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

    def load(self) -> LoadedModel:
        """Return the model, ready to answer."""
        return self.build(self.decide())

    def decide(self) -> Decided:
        """Take the steps of a load that come before any weight is read."""
        phases: dict[str, float] = {}
        _, decided = self._decide(phases)
        return decided

    def build(self, decided: Decided) -> LoadedModel:
        """Take the steps that come after."""
        from loadstone.engine import Engine
        from loadstone.model import build

        phases, decision = dict(decided.phases), decided.plan
        with self._phase("build", phases) as made:
            decoder = build(decision, decided.spec, self.store(), entry=decided.entry)
            made["bytes"] = sum(decoder.weight_bytes().values())
        with self._phase("ready", phases):
            engine = Engine(decoder, decided.tokenizer, decided.template, decision, self.config.config.engine)
        layers = self.config.generation_layers(decided.spec.generation)
        taken = {**decoder.weight_bytes(), "kv_cache": engine.cache_bytes}
        return LoadedModel(decided.spec, decision, decoder, decided.tokenizer, engine, taken, phases, layers)

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
        with self._phase("resolve", phases) as found:
            files = self.resolve(may_be_light=may_be_light)
            found["bytes"] = _bytes_of(files)
        prepare_tokenizers()
        with self._phase("inspect", phases), importing_torch() as torch_is_there:
            spec = inspect(files)
            tokenizer, template = load_tokenizer(spec), load_chat_template(spec)  # or the long work were in vain
            torch_is_there()
        with self._phase("plan", phases):
            return files, Decided(spec, tokenizer, template, self.plan(spec), phases)

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
        wish = self.config.config.model
        with importing_torch() as torch_is_there:  # looking for a GPU takes it, and its memory counts
            spec = spec or inspect(self.resolve())
            torch_is_there()
        device = self._devices.resolve(wish.device)
        settings = self._devices.optimize_memory_settings(device)
        runtime, resident = self._without_model(device.torch_name)
        return plan(wish, spec, device, settings, runtime_bytes=runtime, resident_bytes=resident)

    def _without_model(self, device: str) -> tuple[int, int]:
        """Return what this process takes on `device` beside the model, and what it has there now, in bytes."""
        ground = self._ground
        if device != "cpu":
            return RUNTIME_ALLOWANCE, ground.held if device == ground.device else 0
        resident = process_rss()
        process = resident if ground.process is None else ground.process
        return max(process, ground.settled or process + RUNTIME_ALLOWANCE), resident

    def store(self) -> Store | None:
        """Return the configured store, or None where it is switched off."""
        return open_store(self.config.config.store)

    def _check_wish(self) -> None:
        """Refuse, before anything is fetched, what no model's files could make right."""
        wish = self.config.config.model
        with self._naming("model_config.quantization"):
            if wish.quantization != AUTO:
                find_strategy(wish.quantization)
        if wish.device != AUTO:  # it is always right, and looking for a GPU takes torch
            with self._naming("model_config.device"):
                self._devices.resolve(wish.device)

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
