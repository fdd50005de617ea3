"""The life of a model: load, answer, reload, unload. One manager a process, or as many as one likes.

What it says is what people use; how a model is loaded, leased, swapped and given back is in `life`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .checkpoint.spec import ModelSpec
from .config import ConfigManager, GenerationConfig, LoadstoneConfig
from .errors import ConfigurationError, GenerationError, handle_exceptions
from .hardware import Device, DeviceManager, get_device_manager, memory_limits, peak_rss, process_rss
from .life import Life, MemoryReport, Receipt, trimmed
from .loaded import LoadedModel, PreparedModel
from .memory import nothing_left_on_failure
from .planner import Plan
from .sources import ModelFiles
from .telemetry import emit, subscribe
from .telemetry.log import log_event

if TYPE_CHECKING:  # they bring torch, and transformers
    from .bridge._transformers import PreTrainedModel, PreTrainedTokenizerFast
    from .engine import GenerationResult, Stream
    from .engine.engine import Prompt
    from .engine.tools import Tool

Config = str | os.PathLike[str] | Mapping[str, Any] | ConfigManager | LoadstoneConfig | None

subscribe(log_event)


class ModelManager:
    """Loads one model and answers with it; safe to use from many threads.

    `config` is None (the file that is found, or defaults), a path, a mapping in the file's shape, or a
    ConfigManager. `devices` replaces the machine's devices, for tests.
    """

    def __init__(self, config: Config = None, *, devices: DeviceManager | None = None) -> None:
        said = config if isinstance(config, ConfigManager) else ConfigManager(config)
        self._devices = devices or get_device_manager()
        self._life = Life(said, self._devices)

    @property
    def config(self) -> ConfigManager:
        """The configuration in force; a reload may change it."""
        return self._life.config

    # -- life -----------------------------------------------------------------------------------------------------

    def load(self) -> LoadedModel:
        """Load the configured model, downloading it if needed, and return it; `tokenizer` is one of its attributes.

        Loads once: while it is loaded, the same model comes back, and a second thread waits for the first. After a
        failure nothing remains and the next call starts anew.

        Raises ConfigurationError, ModelLoadError (SourceError, CheckpointError) or ResourceError.
        """
        return self._life.load()

    def load_base_model(self) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
        """Load the configured model as `load` does; return it as a tokenizer and a model of transformers.

        Both are of transformers' own classes (Qwen2ForCausalLM …), over the tensors that this manager answers with:
        there is no second copy. `generate`, `pipeline`, streamers and PEFT's LoRA work on the model. Its weights cannot
        be changed; `save_pretrained(FOLDER)` writes them as a bitsandbytes checkpoint. The same pair comes back as long
        as the model is loaded. After an unload, a reload, or a release when idle, using it is a ModelNotLoadedError.

        Raises what `load` raises, and ConfigurationError where transformers is not installed
        (`pip install "loadstone[transformers]"`) or does not know the architecture.
        """
        with self._life.changing:
            bridge = self._life.load().bridge
            return bridge.tokenizer, bridge.model

    def prepare_model(self, *, keep_original: bool = True) -> PreparedModel:
        """Download the configured model if needed and see that the store has its quantised weights; load nothing.

        Where the strategy has no form to keep, or the store is switched off, the files are all. Without
        `keep_original` the weights are then removed from the Hub's cache, and loads of this name, revision and
        quantization use what is in the store. Raises what `load` raises, and ModelLoadError where the
        weights cannot be kept.
        """
        with self._life.changing, handle_exceptions("prepare the model"), nothing_left_on_failure():
            return self._life.loading().prepare(keep_original=keep_original)

    def resolve(self, *, may_be_light: bool = True) -> ModelFiles:
        """Return the configured model's files, fetching them first where they are not on this machine.

        A model of which only the quantised weights were kept is without the others, unless it must not be.
        """
        return self._life.loading().resolve(may_be_light=may_be_light)

    def unload_model(self, *, cancel: bool = False) -> Receipt:
        """Give the model's memory back; return what came back, and who holds what did not.

        Answers under way are finished first, or with `cancel` ended with GenerationError. When nothing is loaded there
        is nothing to do, and the receipt's `model` is None.
        """
        return self._life.unload(cancel=cancel)

    def reload_model(self, config: Config = None, *, reason: str = "asked", **settings: Any) -> LoadedModel:
        """Load anew, in the place of what is loaded, and return the new model.

        Files are read again, the configuration's too. `config` takes the place of the whole configuration, `settings`
        go over it (quantization="8bit", context=8192, or a section as a mapping) and stay for later reloads. `reason`
        is for the log.

        The new model is planned first. Where there is room for both it is loaded beside the old one, which answers
        until it is ready; else the old one is unloaded, and put back when the new one fails. Requests that come
        meanwhile wait. When this raises (what `load` does), the old model and configuration are in force.
        """
        wanted = self.config.read_again() if config is None else ConfigManager(config)
        return self._life.reload(wanted.with_settings(settings) if settings else wanted, reason=reason)

    # -- answers --------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> GenerationResult:  # fmt: skip
        """Return the answer to a text, or to a conversation (a list of role/content mappings).

        A text goes through the model's chat template as one message of the user, after `system` if given; `raw`
        sends it as it is. `settings` are the fields of GenerationConfig (max_new_tokens, temperature, …); they win
        over `config`, which wins over the configuration file and the checkpoint. `str(result)` is the text.

        `tools` are functions that the model may call: Python functions with type hints, or schemas in OpenAI's form.
        It is told of them by its chat template, and what it calls is in `result.tool_calls`; calling is left to you,
        and what comes of it goes back as a message whose role is "tool". `tool_choice` is "auto" (the model decides),
        "none", "required", or the name of the function to be called; the last two hold it to the function's schema.

        Raises ModelNotLoadedError before `load`, ConfigurationError for a setting that cannot be meant,
        GenerationError when no answer can be made.
        """
        with self._life.lease() as model:
            return model.generate(
                prompt, config, raw=raw, system=system, tools=tools, tool_choice=tool_choice, **settings
            )

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> Stream:  # fmt: skip
        """Return the answer's chunks as they are made; arguments and errors are those of `generate`.

        Leaving the loop or `cancel()` stops the work within one token; `stream.result` has the whole at the end.
        """
        with self._life.lease() as model:
            return model.stream(
                prompt, config, raw=raw, system=system, tools=tools, tool_choice=tool_choice, **settings
            )

    def generate_batch(
        self, prompts: Sequence[Prompt], config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> list[GenerationResult]:  # fmt: skip
        """Return the answers to several prompts, in their order; the prompts run together.

        A prompt that fails has a result with finish_reason "error" and its `error`; the others are not lost.
        """
        with self._life.lease() as model:
            return model.generate_batch(
                prompts, config, raw=raw, system=system, tools=tools, tool_choice=tool_choice, **settings
            )

    def save_prefix_cache(self, file: str | os.PathLike[str]) -> int:
        """Write to `file` what the KV cache remembers of earlier prompts, and return how many tokens that are.

        Waits for answers under way. After `load_prefix_cache` a later process need not read them again. The file is
        as large as their keys and values, and holds the texts' tokens. Raises GenerationError where it cannot be
        written.
        """
        with handle_exceptions("save the prefix cache", into=GenerationError), self._life.lease() as model:
            return model.engine.save_prefixes(file)

    def load_prefix_cache(self, file: str | os.PathLike[str]) -> int:
        """Remember what `save_prefix_cache` wrote, as much as there is room for, and return how many tokens that are.

        Raises GenerationError when the file is not there, is damaged, or is of another model or quantization.
        """
        with handle_exceptions("load the prefix cache", into=GenerationError), self._life.lease() as model:
            return model.engine.load_prefixes(file)

    # -- facts ----------------------------------------------------------------------------------------------------

    def plan(self, spec: ModelSpec | None = None) -> Plan:
        """Return how the configured model would be loaded here, from its headers alone.

        Raises ResourceError when it does not fit, and what `load` raises for its files. `spec` is what
        the headers say, where that is known already.
        """
        return self._life.loading().plan(spec)

    def is_loaded(self) -> bool:
        """Tell whether a model is in memory; one that was let go of when idle is not, until the next request."""
        return self._life.model is not None

    def get_device(self) -> Device:
        """Return the device that the model is on, or would be loaded to, with the reason."""
        model = self._life.model
        wish = self.config.config.model
        return model.plan.device if model else self._devices.resolve(wish.device, require=wish.require)

    def get_model_info(self) -> dict[str, Any]:
        """Return what is loaded, as plain values.

        Names and revision, parameters and bytes by part, strategy, device and reasons, seconds of each phase of the
        load, context, template, the sampling in force with the origin of each value, and the process's memory.
        """
        return {**self._life.ready().info(), "memory": self.get_memory()}

    def get_memory(self) -> dict[str, int]:
        """Return the process's memory in bytes: resident now, at its peak, and what it may still get."""
        return {"rss": process_rss(), "peak_rss": peak_rss(), "free": memory_limits().free_bytes}

    def clear_cache(self) -> int:
        """Give back the KV cache's memory (unless answers are under way) and what allocators keep; return the bytes."""
        return self._trimmed(weights_too=False).freed

    def optimize_memory(self) -> MemoryReport:
        """Give back all that is not needed to go on answering; return what each step gained.

        Beside what `clear_cache` gives back these are the weights' pages that the store's file has: the next answer
        brings them back, from the system's cache as long as they are there, else from the disk.
        """
        return self._trimmed(weights_too=True)

    def _trimmed(self, *, weights_too: bool) -> MemoryReport:
        report = trimmed(self._life.model, weights_too=weights_too)
        emit("memory.trimmed", before=report.before, after=report.after, **report.steps)
        return report

    def __enter__(self) -> ModelManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload_model(cancel=True)


_one: list[ModelManager] = []
_one_lock = threading.Lock()


def get_model_manager(config: Config = None) -> ModelManager:
    """Return the manager of this process, made on the first call with `config`.

    Raises ConfigurationError when a later call brings another configuration: two models in one process take two
    managers of their own.
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


def load_qwen_model(config: Config = None) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Load the configured model (Qwen2.5-7B-Instruct where nothing is configured), as `load_base_model` does."""
    return get_model_manager(config).load_base_model()
