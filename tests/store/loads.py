"""Loads of a checkpoint through a store, here or in a process of its own; both answer with their logits' digest."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from loadstone._blake3 import digest
from loadstone.checkpoint import inspect
from loadstone.config import LoadConfig
from loadstone.hardware import Device, MemorySettings
from loadstone.model import Decoder, build
from loadstone.planner import plan
from loadstone.sources import resolve
from loadstone.store import Store
from warm import PROCESSES

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
    return digest(decoder.logits(IDS).contiguous().view(torch.uint8).numpy())


class Started:
    """A load in a process of its own, killed (SIGKILL) at the `count`-th call of os.`call` where they are given.

    The process is there when this is; it ends with the load.
    """

    def __init__(self, folder: Path, store: Path, call: str | None = None, count: int = 0) -> None:
        self._answer, theirs = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(target=_load_and_tell, args=(theirs, folder, store, call, count))
        self._process.start()
        theirs.close()

    def answer(self, patience: float) -> str:
        """Return what it answers, or raise EOFError when it ends without."""
        assert self._answer.poll(patience), f"nothing came within {patience} s"
        said: str = self._answer.recv()
        return said

    def end(self, patience: float) -> int | None:
        """Return its exit code, which is the negative number of the signal that ended it."""
        self._process.join(patience)
        code: int | None = self._process.exitcode
        return code


def _load_and_tell(answers: Connection, folder: Path, store: Path, call: str | None, count: int) -> None:
    torch.set_num_threads(1)
    if call is not None:
        kill_at(call, count)
    answers.send(answer(load(folder, Store(store))))


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
