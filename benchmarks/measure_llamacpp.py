"""The peer llama.cpp, through llama-cpp-python: loads a GGUF file, asks for one token, prints the moments as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return when things were done, and the memory then; `task` has model, threads, context, prompt, watched files."""
    from llama_cpp import Llama

    from .load_process import Moments

    moments = Moments(task["watched"])
    model = Llama(
        task["model"],
        n_ctx=task["context"],
        n_threads=task["threads"],
        n_threads_batch=task["threads"],
        verbose=False,
    )
    moments.note("loaded")
    tokens = model.tokenize(task["prompt"].encode(), add_bos=False)
    next(model.generate(tokens, temp=0.0))
    moments.note("answered")
    return moments.told(len(tokens), {})


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
