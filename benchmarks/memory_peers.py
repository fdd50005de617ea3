"""The peers of `benchmarks.memory`: what they say that a case would take, or take when they load and answer it.

Knows files and settings; figures are of processes of their own. A peer that has no form of a case gives None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loadstone.checkpoint import inspect, load_tokenizer
from loadstone.hardware import get_device_manager
from loadstone.sources import resolve

from .make_gguf import gguf_file
from .memory_cases import ANSWER_TOKENS, BUNDLED, Case, prompt_tokens
from .prepared import prepare_transformers
from .processes import check_imports, run_module
from .prompts import different_prompts

GGUF_KIND = "Q4_K_M"
ROOM_FOR_USE = 1.2  # accelerate's documents: inference can need 20 % more than the weights
BITS = {"none": 16, "8bit": 8, "4bit": 4}


class Peer:
    """One of the others, for one model; `label` heads its column."""

    label = ""

    def __init__(self, model: str, checkpoint: str, folder: Path) -> None:
        self.model, self.checkpoint, self.folder = model, checkpoint, folder

    def prepare(self) -> None:
        """Find out whether it can be had; raise ModuleFailed where it cannot."""

    def bytes_of(self, case: Case) -> int | None:
        """Return what a case takes, or is said to take."""
        raise NotImplementedError

    def _asked(self, kind: str, case: Case, model: str) -> int:
        """Return the most that a fresh process had that opened `model`, and answered a full context of each stream."""
        task = {
            "kind": kind,
            "settings": {
                "model": model, "device": "cpu", "threads": get_device_manager().resolve("cpu").cores,
                "context": case.context, "streams": case.streams, "strategy": case.strategy,
            },
            "prompts": self._prompts(case),
            "tokens": ANSWER_TOKENS,
        }  # fmt: skip
        return int(run_module("benchmarks.measure_peer_memory", json.dumps(task))["peak_rss_bytes"])

    def _prompts(self, case: Case) -> Sequence[str]:
        tokenizer = load_tokenizer(inspect(resolve(self.checkpoint)))
        return different_prompts(
            case.streams, prompt_tokens(case), lambda text: tokenizer.encode(text, add_special_tokens=False)
        )


class Accelerate(Peer):
    """accelerate's rule: the weights in so many bits, and a fifth of them for everything else."""

    label = "accelerate says"
    _weights: int | None = None  # in bytes, as float32

    def prepare(self) -> None:
        """See that it is installed."""
        check_imports("import accelerate, transformers")

    def bytes_of(self, case: Case) -> int | None:
        """Return what its `estimate-memory` tells of the weights, and the fifth; it reads no GGUF files."""
        if self.model == BUNDLED:
            return None
        if self._weights is None:
            self._weights = int(run_module("benchmarks.measure_accelerate", self.checkpoint)["float32_bytes"])
        return round(self._weights * BITS[case.strategy] / 32 * ROOM_FOR_USE)


class LlamaCpp(Peer):
    """llama.cpp on a GGUF file in 4 bits, where there is one; of the bundled model on its own file."""

    label = f"llama.cpp {GGUF_KIND}"

    def prepare(self) -> None:
        """See that it is installed."""
        check_imports("import llama_cpp")

    def bytes_of(self, case: Case) -> int | None:
        """Return what it takes; its files are made by `benchmarks.make_gguf`, and not here."""
        file = gguf_file(self.folder / "gguf", self.model, GGUF_KIND)
        if self.model == BUNDLED:
            (file,) = resolve(BUNDLED).weights
        if case.strategy != "4bit" or not file.is_file():
            return None
        return self._asked("llamacpp_streams", case, str(file))


class Transformers(Peer):
    """transformers, with bitsandbytes where weights are quantised."""

    label = "transformers + bnb"

    def prepare(self) -> None:
        """See that both are installed."""
        prepare_transformers()

    def bytes_of(self, case: Case) -> int | None:
        """Return what it takes; it quantises no GGUF files."""
        return None if self.model == BUNDLED else self._asked("transformers", case, self.checkpoint)


PEERS: dict[str, type[Peer]] = {"accelerate": Accelerate, "llamacpp": LlamaCpp, "transformers": Transformers}
