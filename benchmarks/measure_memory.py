"""Loads a model in this fresh process, fills every stream's context, and prints what it took as one JSON line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from .process_memory import memory_now
from .prompts import different_prompts


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return what was planned and what was taken; `task` has the configuration, streams, and numbers of tokens."""
    from loadstone import ModelManager

    manager = ModelManager(task["config"])
    before = memory_now()["rss_bytes"]
    started = time.perf_counter()
    model = manager.load()
    loaded_s = time.perf_counter() - started
    loaded = memory_now()
    model.decoder.settle()  # the store has it
    settled = memory_now()

    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=True)

    prompts = different_prompts(task["streams"], task["prompt_tokens"], encode)
    answers = manager.generate_batch(prompts, raw=True, temperature=0, max_new_tokens=task["tokens"])
    failed = [str(answer.error) for answer in answers if answer.error is not None]
    if failed:
        raise RuntimeError(failed[0])
    full = memory_now()
    info = manager.get_model_info()
    manager.unload_model()  # which writes down what it took: later loads of the run are planned with that
    return {
        "before_rss_bytes": before,
        "load_peak_bytes": loaded["peak_rss_bytes"],
        "loaded_rss_bytes": loaded["rss_bytes"],
        "settled_peak_bytes": settled["peak_rss_bytes"],
        "settled_rss_bytes": settled["rss_bytes"],
        "full_rss_bytes": full["rss_bytes"],
        "peak_bytes": full["peak_rss_bytes"],
        "predicted": info["planned_bytes"],
        "likely_bytes": info["likely_bytes"],
        "kept": info["bytes"],
        "read_tokens": sum(answer.usage.prompt_tokens for answer in answers),
        "load_s": loaded_s,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
