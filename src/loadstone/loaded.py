"""A model that is ready: it answers, and tells what it is. And one that is only prepared to be loaded.

Knows which sampling is in force for a call (checkpoint, configuration, call) and hands the rest to the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .checkpoint.spec import ModelSpec
from .checkpoint.tokenizer import Tokenizer
from .config import GenerationConfig, Sampling, resolve_generation, tell_generation
from .errors import ConfigurationError
from .planner import Plan
from .planner.accuracy import LoadRecord
from .store import Entry

if TYPE_CHECKING:  # they bring torch
    from .bridge import Bridge
    from .engine import Engine, GenerationResult, Stream
    from .engine.engine import Prompt
    from .engine.tools import Tool
    from .model import Decoder

Layers = tuple[tuple[str, GenerationConfig], ...]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with everything that was decided about it.

    `bytes` are what its weights take, by part, and its KV cache when full. `phases` are the seconds that each step of
    its load took. `sampling_layers` say what the checkpoint and the configuration want of sampling, weakest first.
    """

    spec: ModelSpec
    plan: Plan
    decoder: Decoder
    tokenizer: Tokenizer
    engine: Engine
    bytes: Mapping[str, int]
    phases: Mapping[str, float]
    sampling_layers: Layers
    record: LoadRecord | None = None

    def generate(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> GenerationResult:  # fmt: skip
        """Return the answer to a text or a conversation; see `ModelManager.generate`."""
        sampling, _ = self.sampling(config, settings)
        offered = self.engine.offer(tools, tool_choice, sampling)
        return self.engine.generate(prompt, sampling, raw=raw, system=system, tools=offered)

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> Stream:  # fmt: skip
        """Start an answer and return its chunks; see `ModelManager.stream`."""
        sampling, _ = self.sampling(config, settings)
        offered = self.engine.offer(tools, tool_choice, sampling)
        return self.engine.stream(prompt, sampling, raw=raw, system=system, tools=offered)

    def generate_batch(
        self, prompts: Sequence[Prompt], config: GenerationConfig | None = None, *, raw: bool = False,
        system: str | None = None, tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **settings: Any,
    ) -> list[GenerationResult]:  # fmt: skip
        """Return the answers to several prompts; see `ModelManager.generate_batch`."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise ConfigurationError(
                f"generate_batch takes a list of prompts, not {type(prompts).__name__}",
                hint="Write generate_batch([prompt, …]).",
            )
        sampling, _ = self.sampling(config, settings)
        offered = self.engine.offer(tools, tool_choice, sampling)
        return self.engine.generate_batch(prompts, sampling, raw=raw, system=system, tools=offered)

    def sampling(
        self, config: GenerationConfig | None = None, settings: Mapping[str, Any] | None = None
    ) -> tuple[Sampling, Mapping[str, str]]:
        """Return what is in force for a call that says `config` and `settings`, and where each value comes from."""
        said = [*self.sampling_layers]
        if config is not None:
            said.append(("GenerationConfig", config))
        if settings:
            said.append(("argument", GenerationConfig(**settings)))
        return resolve_generation(said)

    @cached_property
    def bridge(self) -> Bridge:
        """This model as one of transformers, made on first use; see `ModelManager.load_base_model`."""
        from .bridge import build_bridge

        def used(count: int) -> None:
            self.engine.note_use()
            if self.decoder.attached is not None:
                self.decoder.attached.note_lookups(count)

        template, sampling = self.engine.template, self.sampling()[0]
        return build_bridge(self.spec, self.decoder, self.tokenizer, template, sampling, used)

    def release(self) -> None:
        """Let go of weights and cache, whoever still holds this object; it cannot answer after that."""
        if (bridge := vars(self).get("bridge")) is not None:
            bridge.end()
        self.engine.close()
        self.decoder.release()

    def _kept(self) -> dict[str, Any] | None:
        """Return the entry of the store that the weights are in, or None where they are only in memory (yet)."""
        entry = self.decoder.entry
        if entry is None:
            return None
        return {"key": entry.manifest.key, "folder": str(entry.folder), "made": entry.manifest.made}

    def info(self) -> dict[str, Any]:
        """Return what this model is, as plain values: see `ModelManager.get_model_info`."""
        spec, plan = self.spec, self.plan
        template = self.engine.template
        return {
            "name": spec.name,
            "origin": spec.origin,
            "revision": spec.revision,
            "architecture": spec.architecture.name,
            "format": spec.format,
            "quantized": None if spec.quantized is None else spec.quantized.summary,
            "parameters": {"total": spec.parameters, **spec.parameters_by_part},
            "strategy": plan.strategy,
            "device": plan.device.torch_name,
            "device_name": plan.device.name,
            "device_reason": plan.device.reason,
            "reasons": list(plan.reasons),
            "bytes": dict(self.bytes),
            "planned_bytes": {
                "weights": sum(plan.weight_bytes.values()),
                **plan.other_bytes,
            },
            "likely_bytes": plan.likely_bytes,
            "likely": plan.likely,
            "load_seconds": dict(self.phases),
            "store": self._kept(),
            "context": plan.context,
            "max_context": spec.max_context,
            "template": template.origin if template is not None else None,
            "sampling": tell_generation(*self.sampling()),
        }


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready to be loaded in no time: its files are here, and its quantised weights are in the store.

    `entry` is where they are in the store, and `was_made` says whether they were put there just now. Without one,
    `not_kept` says why. `file_bytes` are what its weights' files take, `phases` the seconds of each step. `freed_bytes`
    is what removing the original weights gave back, or None where they stay.
    """

    spec: ModelSpec
    plan: Plan
    file_bytes: int
    entry: Entry | None
    was_made: bool
    not_kept: str | None
    phases: Mapping[str, float]
    freed_bytes: int | None = None
