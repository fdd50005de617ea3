"""Loads of a checkpoint through a store, in this process or in one of its own; both answer with their logits' digest.

    python loads.py FOLDER STORE STRATEGY [CALL COUNT]

loads in a process of its own, which kills itself (SIGKILL) at the COUNT-th call of os.CALL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

import torch

from loadstone._blake3 import digest
from loadstone.checkpoint import inspect
from loadstone.config import LoadConfig
from loadstone.hardware import Device, MemorySettings
from loadstone.model import Decoder, Segment, build, table_of
from loadstone.planner import plan
from loadstone.sources import resolve
from loadstone.store import Store

CPU = Device("cpu", None, "a processor", 64 << 30, 64 << 30, 2)
SETTINGS = MemorySettings("float32", "float32", 512, 0)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def load(folder: Path, store: Store | None, strategy: str = "4bit") -> Decoder:
    """Load the checkpoint in `folder` through `store`, and wait until it is kept."""
    spec = inspect(resolve(str(folder)))
    wish = LoadConfig(base_model=str(folder), quantization=strategy, context=64)
    decoder = build(plan(wish, spec, CPU, SETTINGS, runtime_bytes=0, resident_bytes=0), spec, store)
    decoder.settle()
    return decoder


def answer(decoder: Decoder) -> str:
    """Return the digest of a decoder's logits for a few tokens: the same for the same weights, bit by bit."""
    cache = decoder.new_cache(64)
    segment = Segment(table_of(cache.take(1)), 0, len(IDS), wanted=len(IDS))
    logits = decoder.forward(IDS, [segment], cache)
    return digest(logits.contiguous().view(torch.uint8).numpy())


def start(folder: Path, store: Path, strategy: str = "4bit", *kill: object) -> subprocess.Popen[str]:
    """Start a load in a process of its own."""
    command = [sys.executable, __file__, str(folder), str(store), strategy, *map(str, kill)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at(call: str, count: int) -> None:
    """Have this process killed at the `count`-th call of os.`call`, when half of that is done where it is a write."""
    original, lock, seen = getattr(os, call), threading.Lock(), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        with lock:
            seen[0] += 1
            is_last = seen[0] == count
        if is_last and call == "pwrite":
            file, raw, offset = arguments
            original(file, raw[: len(raw) // 2], offset)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return original(*arguments, **named)

    setattr(os, call, counted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    if len(given) > 3:
        kill_at(given[3], int(given[4]))
    print(answer(load(Path(given[0]), Store(Path(given[1])), given[2])))
