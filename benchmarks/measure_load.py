"""Loads a model with Loadstone in this fresh process, asks for one token, and prints the moments as one JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return when things were done, and the memory then; `task` has wish, prompt and watched files."""
    from loadstone import ModelManager

    from .load_process import Moments

    moments = Moments(task["watched"])
    manager = ModelManager({"model_config": task["wish"]})
    manager.load()
    moments.note("loaded")
    answer = manager.generate(task["prompt"], raw=True, temperature=0, max_new_tokens=1)
    moments.note("answered")
    info = manager.get_model_info()
    told = moments.told(answer.usage.prompt_tokens, info["load_seconds"])
    manager.unload_model()  # an orderly end: what is still being written is written
    return {**told, "strategy": info["strategy"], "weight_bytes": sum(info["bytes"].values())}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
