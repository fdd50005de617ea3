"""The peer vLLM, opened for `benchmarks.batch` in an environment of its own, which has no Loadstone."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Answer

CACHE_GB = "2"  # of KV cache on processors; vLLM takes it whole


def open_model(settings: Mapping[str, Any]) -> VllmModel:
    """Load the checkpoint `model` in bfloat16 for so many `streams` of `context` tokens."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return VllmModel(
        LLM(
            settings["model"],
            dtype="bfloat16",
            max_model_len=settings["context"],
            max_num_seqs=settings["streams"],
            disable_log_stats=False,  # or it does not tell when the first token came
        )
    )


class VllmModel:
    """An engine that answers greedily and goes on after the end of a text."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        return self.ask_together([text], tokens)[0]

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Return the answers of one batch; the first token's time where this version tells it."""
        from vllm import SamplingParams

        wish = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        asked = time.perf_counter()
        outputs = self._engine.generate(list(texts), wish, use_tqdm=False)
        took = time.perf_counter() - asked
        return [
            Answer(
                len(one.prompt_token_ids),
                len(one.outputs[0].token_ids),
                getattr(one.metrics, "first_token_latency", None),
                took,
                cached_tokens=one.num_cached_tokens,
            )
            for one in outputs
        ]

    def read_per_token(self) -> None:
        """Return None: it is not asked for."""
