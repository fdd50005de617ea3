"""The life of a model: load, answer, reload, unload. One manager a process, or as many as one likes.

A load is five steps, each a room of its own: resolve, inspect, plan, build, ready.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .checkpoint import inspect, load_chat_template, load_tokenizer, prepare_tokenizers
from .checkpoint.spec import ModelSpec
from .checkpoint.template import ChatTemplate
from .checkpoint.tokenizer import Tokenizer
from .config import ConfigManager, GenerationConfig, LoadstoneConfig
from .errors import ConfigurationError, GenerationError, ModelNotLoadedError, handle_exceptions
from .hardware import Device, DeviceManager, get_device_manager, memory_limits, peak_rss, process_rss
from .light import light_files, lighten
from .loaded import LoadedModel, PreparedModel
from .memory import forget_frames, give_back
from .planner import Plan, plan
from .planner.runtime import RUNTIME_ALLOWANCE
from .quantization import AUTO, find_strategy
from .sources import ModelFiles, resolve
from .startup import importing_torch
from .store import Entry, Store, open_store
from .telemetry import subscribe, timed
from .telemetry.log import log_event

if TYPE_CHECKING:  # brings torch
    from .engine import GenerationResult, Stream
    from .engine.engine import Prompt

Config = str | os.PathLike[str] | Mapping[str, Any] | ConfigManager | LoadstoneConfig | None

subscribe(log_event)


class ModelManager:
    """Loads one model and answers with it; safe to use from many threads.

    `config` is None (the file that is found, or defaults), a path, a mapping in the file's shape, or a
    ConfigManager. `devices` replaces the machine's devices, for tests.
    """

    def __init__(self, config: Config = None, *, devices: DeviceManager | None = None) -> None:
        self.config = config if isinstance(config, ConfigManager) else ConfigManager(config)
        self._devices = devices or get_device_manager()
        self._life = threading.RLock()  # held while loading or unloading: one at a time
        self._model: LoadedModel | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    def load_base_model(self) -> tuple[Tokenizer, LoadedModel]:
        """Load the configured model, downloading it if needed; return its tokenizer and the model.

        Loads once: while it is loaded, the same pair comes back, and a second thread waits for the first. After a
        failure nothing remains and the next call starts anew.

        Raises ConfigurationError, ModelLoadError (SourceError, CheckpointError) or ResourceError.
        """
        with self._life:
            if self._model is None:
                with handle_exceptions("load the model"), self._nothing_left_on_failure():
                    self._model = self._load()
            return self._model.tokenizer, self._model

    def prepare_model(self, *, keep_original: bool = True) -> PreparedModel:
        """Download the configured model if needed and see that the store has its quantised weights; load nothing.

        Where the strategy has no form to keep, or the store is switched off, the files are all. Without
        `keep_original` the weights are then removed from the Hub's cache, and loads of this name, revision and
        quantization use what is in the store. Raises what `load_base_model` raises, and ModelLoadError where the
        weights cannot be kept.
        """
        with self._life, handle_exceptions("prepare the model"), self._nothing_left_on_failure():
            phases: dict[str, float] = {}
            files, spec, _, _, decision = self._decide(phases, may_be_light=not keep_original)
            with self._phase("keep", phases):
                entry, was_made, not_kept = self._keep(decision, spec)
            file_bytes = _bytes_of(files)
            freed = None if keep_original else lighten(self.config.config.model, self._store(), files, spec, entry)
            return PreparedModel(spec, decision, file_bytes, entry, was_made, not_kept, phases, freed)

    def _load(self) -> LoadedModel:
        phases: dict[str, float] = {}
        _, spec, tokenizer, template, decision = self._decide(phases)
        from .engine import Engine
        from .model import build

        with self._phase("build", phases) as made:
            decoder = build(decision, spec, self._store())
            made["bytes"] = sum(decoder.weight_bytes().values())
        with self._phase("ready", phases):
            engine = Engine(decoder, tokenizer, template, decision, self.config.config.engine)
        layers = self.config.generation_layers(spec.generation)
        taken = {**decoder.weight_bytes(), "kv_cache": engine.cache_bytes}
        return LoadedModel(spec, decision, decoder, tokenizer, engine, taken, phases, layers)

    def _decide(
        self, phases: dict[str, float], *, may_be_light: bool = True
    ) -> tuple[ModelFiles, ModelSpec, Tokenizer, ChatTemplate | None, Plan]:  # fmt: skip
        """Take the steps of a load that come before any weight is read."""
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
            return files, spec, tokenizer, template, self.plan(spec)

    def _keep(self, decision: Plan, spec: ModelSpec) -> tuple[Entry | None, bool, str | None]:
        """Return the store's entry for a plan and whether it was made now, or why there is none."""
        from .model import can_be_kept, keep

        store = self._store()
        if not can_be_kept(decision):
            return None, False, f"{decision.strategy} has no quantised form to keep"
        if store is None:
            return None, False, f"the store is switched off ({self.config.origin('store.enabled')})"
        return *keep(decision, spec, store), None

    def resolve(self, *, may_be_light: bool = True) -> ModelFiles:
        """Return the configured model's files, fetching them first where they are not on this machine.

        A model of which only the quantised weights were kept is without the others, unless it must not be.
        """
        wish = self.config.config.model
        if may_be_light and (light := light_files(wish, self._store())) is not None:
            return light
        return resolve(wish.base_model, revision=wish.revision, offline=wish.offline, retry=self.config.config.retry)

    def _store(self) -> Store | None:
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

    @contextmanager
    def _nothing_left_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            forget_frames(error)
            give_back()
            raise

    def unload_model(self, *, cancel: bool = False) -> None:
        """Give the model's memory back; do nothing when none is loaded.

        Answers under way are finished first, or with `cancel` ended with GenerationError.
        """
        with self._life:
            model, self._model = self._model, None
            if model is None:
                return
            with timed("unload", model=model.spec.name):
                try:
                    if not cancel:
                        model.engine.drain()
                finally:  # also when Ctrl-C ends the wait
                    model.engine.close()
                    model.decoder.release()
                    del model
                    give_back()

    def reload_model(self) -> tuple[Tokenizer, LoadedModel]:
        """Unload, when one is loaded, and load again, with the files as they are now."""
        with self._life:
            self.unload_model()
            return self.load_base_model()

    # -- answers --------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, **settings: Any,
    ) -> GenerationResult:  # fmt: skip
        """Return the answer to a text, or to a conversation (a list of role/content mappings).

        A text goes through the model's chat template as one message of the user, after `system` if given; `raw`
        sends it as it is. `settings` are the fields of GenerationConfig (max_new_tokens, temperature, …); they win
        over `config`, which wins over the configuration file and the checkpoint. `str(result)` is the text.

        Raises ModelNotLoadedError before `load_base_model`, ConfigurationError for a setting that cannot be meant,
        GenerationError when no answer can be made.
        """
        return self._ready().generate(prompt, config, raw=raw, system=system, **settings)

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, **settings: Any,
    ) -> Stream:  # fmt: skip
        """Return the answer's chunks as they are made; arguments and errors are those of `generate`.

        Leaving the loop or `cancel()` stops the work within one token; `stream.result` has the whole at the end.
        """
        return self._ready().stream(prompt, config, raw=raw, system=system, **settings)

    def generate_batch(
        self, prompts: Sequence[Prompt], config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, **settings: Any,
    ) -> list[GenerationResult]:  # fmt: skip
        """Return the answers to several prompts, in their order; the prompts run together.

        A prompt that fails has a result with finish_reason "error" and its `error`; the others are not lost.
        """
        return self._ready().generate_batch(prompts, config, raw=raw, system=system, **settings)

    def save_prefix_cache(self, file: str | os.PathLike[str]) -> int:
        """Write to `file` what the KV cache remembers of earlier prompts, and return how many tokens that are.

        Waits for answers under way. After `load_prefix_cache` a later process need not read them again. The file is
        as large as their keys and values, and holds the texts' tokens. Raises GenerationError where it cannot be
        written.
        """
        with handle_exceptions("save the prefix cache", into=GenerationError):
            return self._ready().engine.save_prefixes(file)

    def load_prefix_cache(self, file: str | os.PathLike[str]) -> int:
        """Remember what `save_prefix_cache` wrote, as much as there is room for, and return how many tokens that are.

        Raises GenerationError when the file is not there, is damaged, or is of another model or quantization.
        """
        with handle_exceptions("load the prefix cache", into=GenerationError):
            return self._ready().engine.load_prefixes(file)

    # -- facts ----------------------------------------------------------------------------------------------------

    def plan(self, spec: ModelSpec | None = None) -> Plan:
        """Return how the configured model would be loaded here, from its headers alone.

        Raises ResourceError when it does not fit, and what `load_base_model` raises for its files. `spec` is what
        the headers say, where that is known already.
        """
        wish = self.config.config.model
        with importing_torch() as torch_is_there:  # looking for a GPU takes it, and its memory counts
            spec = spec or inspect(self.resolve())
            torch_is_there()
        device = self._devices.resolve(wish.device)
        settings = self._devices.optimize_memory_settings(device)
        runtime = RUNTIME_ALLOWANCE + (process_rss() if device.kind == "cpu" else 0)
        return plan(wish, spec, device, settings, runtime_bytes=runtime)

    def is_loaded(self) -> bool:
        """Tell whether a model is ready to answer."""
        return self._model is not None

    def get_device(self) -> Device:
        """Return the device that the model is on, or would be loaded to, with the reason."""
        model = self._model
        return model.plan.device if model else self._devices.resolve(self.config.config.model.device)

    def get_model_info(self) -> dict[str, Any]:
        """Return what is loaded, as plain values.

        Names and revision, parameters and bytes by part, strategy, device and reasons, seconds of each phase of the
        load, context, template, the sampling in force with the origin of each value, and the process's memory.
        """
        return {**self._ready().info(), "memory": self.get_memory()}

    def get_memory(self) -> dict[str, int]:
        """Return the process's memory in bytes: resident now, at its peak, and what it may still get."""
        return {"rss": process_rss(), "peak_rss": peak_rss(), "free": memory_limits().free_bytes}

    def clear_cache(self) -> int:
        """Give back the KV cache's pages (when no answer is under way) and what allocators keep; return bytes freed."""
        before = process_rss()
        if (model := self._model) is not None:
            model.engine.renew_cache()
        give_back()
        return max(0, before - process_rss())

    def optimize_memory(self) -> dict[str, int]:
        """Give back all that is not needed to go on answering; return resident bytes before and after."""
        before = process_rss()
        self.clear_cache()
        return {"before": before, "after": process_rss()}

    def _ready(self) -> LoadedModel:
        model = self._model
        if model is None:
            raise ModelNotLoadedError(
                "No model is loaded.", hint="Call load_base_model() first; it loads the configured model."
            )
        return model

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload_model(cancel=True)


def _bytes_of(files: ModelFiles) -> int:
    return sum(file.stat().st_size for file in files.weights)


_one: list[ModelManager] = []
_one_lock = threading.Lock()


def get_model_manager(config: Config = None) -> ModelManager:
    """Return the manager of this process, made on the first call with `config`.

    Raises ConfigurationError when a later call brings another configuration: two models in one process take two
    `ModelManager`s.
    """
    with _one_lock:
        if not _one:
            _one.append(ModelManager(config))
        elif config is not None and ConfigManager(config).config != _one[0].config.config:
            raise ConfigurationError(
                "This process's manager has another configuration already.",
                hint="Use ModelManager(config) for a second model, or call get_model_manager() without arguments.",
            )
        return _one[0]


def load_qwen_model(config: Config = None) -> tuple[Tokenizer, LoadedModel]:
    """Load the configured model (Qwen2.5-7B-Instruct where nothing is configured); return tokenizer and model."""
    return get_model_manager(config).load_base_model()
