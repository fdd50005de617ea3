"""Loads one quantised checkpoint in this fresh process, holds it against its reference, and decodes; prints JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from loadstone.model import Decoder

WARM, STEPS = 8, 48
PARTS = {
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return seconds, bytes and the error of a load as nobody asks otherwise, without a store."""
    import torch
    from safetensors.torch import load_file

    from loadstone import ModelManager
    from loadstone.model import build
    from loadstone.quantization.kernels.cpu import cpu_kernels
    from loadstone.sources import resolve

    torch.set_num_threads(task["threads"])
    cpu_kernels()  # compiled, or read from the disk, before anything is timed
    manager = ModelManager({"model_config": {"base_model": task["model"], "device": "cpu", "context": 512}})
    files = resolve(task["model"])
    from loadstone.checkpoint import inspect

    spec = inspect(files)
    plan = manager.plan(spec)
    started = time.perf_counter()
    decoder = build(plan, spec)
    load_s = time.perf_counter() - started
    torch.set_num_threads(task["threads"])
    return {
        "strategy": plan.strategy,
        "quantized": None if spec.quantized is None else spec.quantized.summary,
        "file_bytes": sum(file.stat().st_size for file in files.weights),
        "weight_bytes": sum(decoder.weight_bytes().values()),
        "load_s": load_s,
        "error": error(decoder, load_file(task["reference"])),
        "decode_tokens_per_s": decode_rate(decoder),
    }


def error(decoder: Decoder, reference: dict[str, torch.Tensor]) -> float:
    """Return how far the first layer's matrices are from the format's own numbers: the length of the difference by
    that of the numbers, the largest of all products."""
    import torch

    found = []
    for part, modules in PARTS.items():
        kept = getattr(decoder.layers[0], part).weight
        wanted = torch.cat([reference[f"model.layers.0.{module}.weight"] for module in modules])
        found.append(float((kept.dequantize(0, kept.rows, torch.float32) - wanted).norm() / wanted.norm()))
    return max(found)


def decode_rate(decoder: Decoder) -> float:
    """Return the steps of one token that the decoder makes in a second, by the median step."""
    import torch

    from loadstone.model import Segment, blocks_for
    from loadstone.quantization.kernels.words import KV_BLOCK

    blocks = blocks_for(WARM + STEPS)
    cache = decoder.new_cache(blocks * KV_BLOCK)
    table, seconds = torch.arange(blocks), []
    for start in range(WARM + STEPS):
        began = time.perf_counter()
        decoder.forward([start], [Segment(table, start, 1, 1)], cache)
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[WARM:])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
