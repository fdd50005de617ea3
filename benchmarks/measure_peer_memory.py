"""Opens a peer's model in this fresh process, asks it all prompts at once, and prints its memory as one JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any

from .answers import open_model
from .process_memory import memory_now


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return what the process has and had at most; `task` has kind, settings, prompts, and tokens of each answer."""
    model = open_model(task["kind"], task["settings"])
    opened = memory_now()
    answers = model.ask_together(task["prompts"], task["tokens"])
    return {
        **memory_now(),
        "load_peak_bytes": opened["peak_rss_bytes"],
        "read_tokens": sum(answer.prompt_tokens for answer in answers),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
