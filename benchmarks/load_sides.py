"""The sides of `benchmarks.load`: what each reads, what its process is told, and what it needs before its first load.

Knows files and settings, not figures. A side is measured in the cases whose kind it has.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .job import Job
from .make_gguf import KINDS, gguf_file
from .prepared import gguf_folder, plain_environment, prepare_llamacpp, prepare_transformers
from .processes import run_module

CONTEXT = 2048  # tokens of KV cache, on all sides that reserve one


@dataclass(frozen=True)
class Case:
    """One way to load: `kind` is "first" (from the checkpoint) or "later" (from what a first load left on disk)."""

    kind: str
    is_cold: bool

    @property
    def name(self) -> str:
        """For tables, and as a key: "first load, cold"."""
        return f"{self.kind} load, {'cold' if self.is_cold else 'warm'}"


# In this order a later load finds what the first one left; the fourth starts from nothing again.
CASES = (Case("first", True), Case("later", True), Case("later", False), Case("first", False))


class Side:
    """One way to run the model; the kinds of `kinds` are measured with `module`."""

    label = ""
    kinds: tuple[str, ...] = ()
    module = ""

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> Mapping[str, float]:
        """Make what a load needs, bring the imports into memory; return the seconds of what users pay once."""
        return {}

    def begin(self, case: Case) -> None:
        """Make the state from which a case starts."""

    def reads(self, case: Case) -> list[Path]:
        """Return the files that are put out of the page cache, or into it, before a case."""
        return self.job.files()

    def weights(self, case: Case) -> list[Path]:
        """Return the files whose bytes a load of this case has to read."""
        return self.job.weights()

    def watched(self, case: Case) -> list[Path]:
        """Return the files of weights that stay in use, and so are in memory some time after a cold load."""
        return []

    def task(self, case: Case) -> dict[str, Any]:
        """Return what the measured process is told."""
        watched = [str(file) for file in self.watched(case)]
        return {"prompt": self.job.prompt, "threads": self.job.threads, "context": CONTEXT, "watched": watched}

    def environment(self) -> dict[str, str] | None:
        """Return the variables of the measured process, or None for those of this one."""
        return None

    def close(self) -> None:
        """Remove what only this run needs."""


class Loadstone(Side):
    """Loadstone's `4bit`, with a home of its own: a fresh one for every first load, but for the compiled kernels."""

    label = "Loadstone 4bit"
    kinds = ("first", "later")
    module = "benchmarks.measure_load"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._home: Path | None = None

    def prepare(self) -> Mapping[str, float]:
        """Load once, unmeasured: kernels are compiled once a machine, not once a model."""
        self._renew()
        run_module(self.module, json.dumps(self.task(CASES[-1])), environment=self.environment())
        return {}

    def begin(self, case: Case) -> None:
        """Start a first load from an empty store; a later one keeps the home of the load before."""
        if case.kind == "first" or self._home is None:
            self._renew()

    def reads(self, case: Case) -> list[Path]:
        """Return the checkpoint's files and, for a later load, all of the store's.

        Before a warm later load the checkpoint's weights are left out: it has no use for them, and the memory that
        they take may be what the store needs.
        """
        stored = self._store("*") if case.kind == "later" else []
        unused = self.job.weights() if stored and not case.is_cold else []
        return [file for file in self.job.files() if file not in unused] + stored

    def weights(self, case: Case) -> list[Path]:
        """Return the store's weights for a later load, the checkpoint's for a first one or where nothing is stored."""
        return (case.kind == "later" and self._store()) or self.job.weights()

    def watched(self, case: Case) -> list[Path]:
        """Return the store's weights before a cold later load."""
        return self._store() if case == Case("later", True) else []

    def task(self, case: Case) -> dict[str, Any]:
        """Return what the measured process is told: the wish, as in a configuration, and what all are told."""
        wish = {"base_model": str(self.job.checkpoint), "device": "cpu", "quantization": "4bit", "context": CONTEXT}
        if self.job.max_memory is not None:
            wish["max_memory"] = self.job.max_memory
        return {**super().task(case), "wish": wish}

    def environment(self) -> dict[str, str]:
        """Return this process's variables with the home, and without other settings of Loadstone."""
        assert self._home is not None  # prepare or begin made it
        return plain_environment(self._home)

    def close(self) -> None:
        """Remove the home; the kernels stay for the next run."""
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def _renew(self) -> None:
        self.close()
        kernels = self.job.folder.resolve() / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        self._home = Path(tempfile.mkdtemp(prefix="home-", dir=kernels.parent))  # on the disk that is measured
        (self._home / "cache").mkdir()
        (self._home / "cache" / "kernels").symlink_to(kernels)

    def _store(self, pattern: str = "*.safetensors") -> list[Path]:
        if self._home is None:
            return []
        return sorted(file for file in (self._home / "cache" / "store").rglob(pattern) if file.is_file())


class Transformers(Side):
    """transformers + bitsandbytes NF4: it keeps nothing, so every load is a first one."""

    label = "transformers NF4"
    kinds = ("first",)
    module = "benchmarks.measure_transformers_load"

    def prepare(self) -> Mapping[str, float]:
        """Import it once."""
        return prepare_transformers()

    def task(self, case: Case) -> dict[str, Any]:
        """Return what all are told, and the checkpoint."""
        return {**super().task(case), "model": str(self.job.checkpoint)}


class LlamaCpp(Side):
    """llama.cpp on one kind of GGUF file, which was made from the checkpoint: every load is a later one."""

    kinds = ("later",)
    module = "benchmarks.measure_llamacpp"

    def __init__(self, job: Job, kind: str) -> None:
        super().__init__(job)
        self.label = f"llama.cpp {kind}"
        self._kind = kind

    def prepare(self) -> Mapping[str, float]:
        """Make the files of all kinds, where they are not there; return the seconds of both steps for this one."""
        return prepare_llamacpp(self.job, self._kind)

    def reads(self, case: Case) -> list[Path]:
        """Return the GGUF file."""
        return [gguf_file(gguf_folder(self.job), self.job.name, self._kind)]

    def weights(self, case: Case) -> list[Path]:
        """Return the GGUF file."""
        return self.reads(case)

    def watched(self, case: Case) -> list[Path]:
        """Return the GGUF file before a cold load."""
        return self.reads(case) if case.is_cold else []

    def task(self, case: Case) -> dict[str, Any]:
        """Return what all are told, and the file."""
        return {**super().task(case), "model": str(self.reads(case)[0])}


def sides_of(job: Job, peers: list[str]) -> list[Side]:
    """Return Loadstone and the wanted peers, in the order in which they take turns."""
    sides: list[Side] = [Loadstone(job)]
    for peer in peers:
        sides += [Transformers(job)] if peer == "transformers" else [LlamaCpp(job, kind) for kind in KINDS]
    return sides
