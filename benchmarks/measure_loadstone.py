"""Loads a model with Loadstone in this fresh process, asks it twice, and prints the measurements as one JSON line."""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before anything is imported: imports are part of a load

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return what loading and answering took; `task` has model, tokens, prompt sizes and settings."""
    from loadstone import ModelManager

    wish = {key: task[key] for key in ("device", "quantization", "max_memory") if task.get(key) is not None}
    manager = ModelManager({"model_config": {"base_model": task["model"], **wish}})
    tokenizer = manager.load().tokenizer
    load_s = time.perf_counter() - STARTED

    from .prompts import prompt_of
    from .weights import read_per_token

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=True))

    def ask(prompt_tokens: int, tokens: int) -> Any:
        prompt = prompt_of(prompt_tokens, count)
        return manager.generate(prompt, raw=True, temperature=0, max_new_tokens=tokens)

    first = ask(task["short_prompt"], 2)  # nothing is warm: pages, kernels, thread
    answer = ask(task["short_prompt"], task["tokens"])
    long = ask(task["long_prompt"], 1)
    info = manager.get_model_info()
    steady = manager.get_memory()
    return {
        "load_s": load_s,
        "first_token_s": first.timing.first_token_s,
        "decode_tokens_per_s": answer.timing.tokens_per_s,
        "prefill_tokens_per_s": long.usage.prompt_tokens / (long.timing.first_token_s - long.timing.queued_s),
        "peak_rss_bytes": steady["peak_rss"],
        "steady_rss_bytes": steady["rss"],
        "decoded_tokens": answer.usage.completion_tokens,
        "short_prompt_tokens": answer.usage.prompt_tokens,
        "long_prompt_tokens": long.usage.prompt_tokens,
        "load_phases_s": info["load_seconds"],
        "device": info["device"],
        "strategy": info["strategy"],
        "bytes_read_per_token": read_per_token(info["bytes"]),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
