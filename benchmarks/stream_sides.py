"""The sides of `benchmarks.decode` and `benchmarks.batch`: how each is got ready, and opened in a process of its own.

Knows files and settings, not figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .job import Job
from .make_gguf import KINDS, gguf_file
from .prepared import (
    gguf_folder,
    openvino_folder,
    plain_environment,
    prepare_llamacpp,
    prepare_openvino,
    prepare_transformers,
    prepare_vllm,
)
from .processes import ModuleFailed, run_module
from .weights import gguf_read_per_token, openvino_read_per_token

FEATURES = ("prefix_reuse", "speculation")
ROOT = Path(__file__).parents[1]


class Side:
    """One way to run the model; `kind` says which `model_KIND.py` opens it, `python` which interpreter runs it."""

    label = ""
    kind = ""
    python: str | None = None

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> Mapping[str, float]:
        """Make what opening needs, bring the imports into memory; return the seconds of what users pay once."""
        return {}

    def settings(self, context: int, streams: int) -> dict[str, Any]:
        """Return what the model is opened with, for so many streams of so many tokens."""
        job = self.job
        told = {"threads": job.threads, "device": job.device, "context": context, "streams": streams}
        return {**told, "model": str(job.checkpoint)}

    def environment(self) -> dict[str, str] | None:
        """Return the variables of the measured process, or None for those of this one."""
        return None if self.python is None else {**os.environ, "PYTHONPATH": str(ROOT)}

    def read_per_token(self) -> int | None:
        """Return the bytes of weights that a token needs, or None where the open model knows it."""
        return None

    def close(self) -> None:
        """Remove what only this run needs."""


class Loadstone(Side):
    """Loadstone's `4bit` with a home in the job's folder, whose store has the weights after the first load.

    Without `has_features` it neither uses prompts again nor guesses tokens.
    """

    kind = "loadstone"
    name = "Loadstone 4bit"

    def __init__(self, job: Job, *, has_features: bool = True) -> None:
        super().__init__(job)
        self._has_features = has_features
        self.label = self.name if has_features else f"{self.name}, plain"

    def prepare(self) -> Mapping[str, float]:
        """Load once, unmeasured: kernels are compiled, and the store has the weights."""
        if not self._has_features and not known_features():
            raise ModuleFailed("this version has no features that can be switched off")
        wish = self._wish(1024, 1)
        task = {"wish": wish, "prompt": self.job.prompt, "watched": []}
        run_module("benchmarks.measure_load", json.dumps(task), environment=self.environment())
        return {}

    def settings(self, context: int, streams: int) -> dict[str, Any]:
        """Return the sections of the configuration."""
        config: dict[str, Any] = {"model_config": self._wish(context, streams)}
        if features := known_features():
            config["engine"] = dict.fromkeys(features, self._has_features)
        return {"config": config}

    def environment(self) -> dict[str, str]:
        """Return this process's variables with the home, and without other settings of Loadstone."""
        return plain_environment(self.job.folder.resolve() / "home")

    def _wish(self, context: int, streams: int) -> dict[str, Any]:
        wish = {"base_model": str(self.job.checkpoint), "device": self.job.device, "quantization": "4bit"}
        more = {} if self.job.max_memory is None else {"max_memory": self.job.max_memory}
        return {**wish, "context": context, "streams": streams, **more}


def known_features() -> list[str]:
    """Return the features that this version of Loadstone can switch; older ones are measured without."""
    from loadstone.config.schema import SECTIONS

    fields = SECTIONS["engine"][1].model_fields if "engine" in SECTIONS else {}
    return [name for name in FEATURES if name in fields]


class Transformers(Side):
    """transformers + bitsandbytes NF4."""

    label = "transformers NF4"
    kind = "transformers"

    def prepare(self) -> Mapping[str, float]:
        """Import it once."""
        return prepare_transformers()


class LlamaCpp(Side):
    """llama.cpp on one kind of GGUF file, made from the checkpoint."""

    def __init__(self, job: Job, quantization: str, *, has_streams: bool = False) -> None:
        super().__init__(job)
        self.label = f"llama.cpp {quantization}"
        self.kind = "llamacpp_streams" if has_streams else "llamacpp"
        self._quantization = quantization

    def prepare(self) -> Mapping[str, float]:
        """Make the files, where they are not there."""
        return prepare_llamacpp(self.job, self._quantization)

    def settings(self, context: int, streams: int) -> dict[str, Any]:
        """Return what all are told, and the file."""
        return {**super().settings(context, streams), "model": str(self._file())}

    def read_per_token(self) -> int:
        """Return what the file says."""
        return gguf_read_per_token(self._file())

    def _file(self) -> Path:
        return gguf_file(gguf_folder(self.job), self.job.name, self._quantization)


class Elsewhere(Side):
    """A side that is run by the interpreter of another environment."""

    def __init__(self, job: Job, python: str | None) -> None:
        super().__init__(job)
        self.python = python


class OpenVino(Elsewhere):
    """OpenVINO GenAI on an int4 export of the checkpoint, run by another interpreter."""

    label = "OpenVINO int4"
    kind = "openvino"

    def prepare(self) -> Mapping[str, float]:
        """Export the checkpoint, unless it was."""
        return prepare_openvino(self.job, self.python)

    def settings(self, context: int, streams: int) -> dict[str, Any]:
        """Return what all are told, and the exported folder."""
        return {**super().settings(context, streams), "model": str(openvino_folder(self.job))}

    def read_per_token(self) -> int | None:
        """Return what the files say."""
        shape = self.job.shape
        return None if shape is None else openvino_read_per_token(openvino_folder(self.job), shape)


class Vllm(Elsewhere):
    """vLLM on the checkpoint in bfloat16, run by another interpreter."""

    label = "vLLM bf16"
    kind = "vllm"

    def prepare(self) -> Mapping[str, float]:
        """Import it once."""
        return prepare_vllm(self.python)


def loadstone_sides(job: Job) -> list[Side]:
    """Return Loadstone as it comes, and without its features."""
    return [Loadstone(job), Loadstone(job, has_features=False)]


def decode_sides(job: Job, peers: Sequence[str], openvino: str | None) -> list[Side]:
    """Return Loadstone and the wanted peers for one stream, in the order in which they take turns."""
    known: dict[str, list[Side]] = {
        "transformers": [Transformers(job)],
        "llamacpp": [LlamaCpp(job, kind) for kind in KINDS],
        "openvino": [OpenVino(job, openvino)],
    }
    return [*loadstone_sides(job), *(side for peer in peers for side in known[peer])]


def batch_sides(job: Job, peers: Sequence[str], vllm: str | None) -> list[Side]:
    """Return Loadstone and the wanted peers for many streams, in the order in which they take turns."""
    known: dict[str, list[Side]] = {
        "transformers": [Transformers(job)],
        "llamacpp": [LlamaCpp(job, kind, has_streams=True) for kind in KINDS],
        "vllm": [Vllm(job, vllm)],
    }
    return [*loadstone_sides(job), *(side for peer in peers for side in known[peer])]
