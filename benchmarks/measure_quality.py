"""Scores one way of Loadstone to keep weights, in this fresh process; prints the windows' scores as one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return each window's score, and the bytes of weights that a token reads.

    `task` has the folder of a checkpoint whose head is its own, the windows' and the reference's files, threads, and
    how weights are kept: a strategy, or one of 4 bits with its embedding and head.
    """
    import torch

    from loadstone import ModelManager
    from loadstone.checkpoint import inspect
    from loadstone.model import build
    from loadstone.quantization import register_strategy
    from loadstone.quantization.int4 import Int4
    from loadstone.quantization.nf4 import Nf4
    from loadstone.sources import resolve

    from .quality_scores import score
    from .weights import read_per_token

    name = task["strategy"]
    if task["embedding"] is not None:
        name = f"{name}-{task['embedding']}-{task['lm_head']}"
        kind = {"4bit": Nf4, "int4": Int4}[task["strategy"]]
        register_strategy(kind(name, embedding=task["embedding"], lm_head=task["lm_head"]))
    windows = json.loads(Path(task["windows"]).read_text(encoding="utf-8"))
    longest = max(map(len, windows))
    wish = {"base_model": task["folder"], "device": "cpu", "quantization": name, "context": longest, "force": True}
    spec = inspect(resolve(task["folder"]))
    decoder = build(ModelManager({"model_config": wish}).plan(spec), spec)
    torch.set_num_threads(task["threads"])
    found = score(windows, spec.vocab_size, Path(task["reference"]), decoder.logits)
    return {
        "scores": [vars(one) for one in found],
        "bytes_read_per_token": read_per_token(decoder.weight_bytes()),
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
