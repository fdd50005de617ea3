"""What is measured: one shape's checkpoint, where its files are, and with how much of the machine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadstone.checkpoint import inspect
from loadstone.errors import LoadstoneError
from loadstone.sources import resolve

from .checkpoints import Shape, write_checkpoint
from .prompts import prompt_of

PROMPT_TOKENS = 40


@dataclass(frozen=True)
class Job:
    """What all sides are given: the shape's name, its checkpoint, a folder for their own files, prompt and threads."""

    name: str
    checkpoint: Path
    folder: Path
    prompt: str
    threads: int
    max_memory: str | None = None
    device: str = "cpu"
    shape: Shape | None = None

    def weights(self) -> list[Path]:
        """Return the checkpoint's files of weights."""
        return sorted(self.checkpoint.glob("*.safetensors"))

    def files(self) -> list[Path]:
        """Return all of the checkpoint's files."""
        return sorted(file for file in self.checkpoint.iterdir() if file.is_file())


def is_whole(folder: Path, shape: Shape) -> bool:
    """Tell whether a folder has a checkpoint of this shape, with every tensor, and a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        tensors = inspect(resolve(str(folder))).tensors
    except LoadstoneError:
        return False
    return {name: tensor.shape for name, tensor in tensors.items()} == dict(shape.tensors())


def job_of(
    name: str, shape: Shape, said: argparse.Namespace, threads: int, report: Console, *, device: str = "cpu"
) -> Job:
    """Return the job of one shape, its checkpoint made unless it is there."""
    from tokenizers import Tokenizer

    checkpoint = said.folder / name
    if not is_whole(checkpoint, shape):
        report.print(f"{name}: writing the checkpoint …", style="dim")
        write_checkpoint(shape, checkpoint, tokenizer=said.tokenizer)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = prompt_of(PROMPT_TOKENS, lambda text: len(tokenizer.encode(text)))
    return Job(name, checkpoint, said.folder, prompt, threads, said.max_memory, device, shape)
