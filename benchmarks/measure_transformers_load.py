"""The peer transformers + bitsandbytes NF4: loads a model, asks for one token, prints the moments as one JSON line."""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return when things were done, and the memory then; `task` has model, threads, prompt and watched files."""
    import bitsandbytes  # noqa: F401  transformers would import it during the load
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: F401  it imports lazily

    from .load_process import Moments
    from .measure_transformers import load_4bit

    moments = Moments(task["watched"])
    tokenizer, model = load_4bit(task["model"], "cpu", task["threads"])
    moments.note("loaded")
    inputs = tokenizer(task["prompt"], return_tensors="pt")
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    moments.note("answered")
    return moments.told(inputs["input_ids"].shape[1], {})


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
