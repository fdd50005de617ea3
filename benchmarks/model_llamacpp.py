"""The peer llama.cpp, opened for `benchmarks.decode` through llama-cpp-python's own class, as its users do it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from .answers import Answer


def open_model(settings: Mapping[str, Any]) -> LlamaCppModel:
    """Load the GGUF file `model`, with a `context` in tokens and as many `threads`; all of it on a GPU `device`."""
    from llama_cpp import Llama

    threads = settings["threads"]
    return LlamaCppModel(
        Llama(
            settings["model"],
            n_ctx=settings["context"],
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0 if settings["device"] == "cpu" else -1,
            verbose=False,
        )
    )


class LlamaCppModel:
    """A model that goes on after the end of a text, and keeps what the last prompt and this one have in common."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        prompt = self._model.tokenize(text.encode(), add_bos=False)
        asked = time.perf_counter()
        times = [time.perf_counter() - asked for _ in islice(self._model.generate(prompt, temp=0.0), tokens)]
        return Answer(len(prompt), len(times), times[0], times[-1])

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Refuse: this class answers one at a time; model_llamacpp_streams.py answers many."""
        raise NotImplementedError

    def read_per_token(self) -> None:
        """Return None: the file says it."""
