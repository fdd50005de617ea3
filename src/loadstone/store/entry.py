"""An entry of the store: what it says of itself, whether that is true, and its tensors read to a device.

Knows names, tensors and facts, not what a strategy makes of them. `attached.py` maps an entry into the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone._blake3 import Digest, digest_of_facts
from loadstone.checkpoint import safetensors
from loadstone.checkpoint.disk import Buffer, FileReader
from loadstone.checkpoint.spec import TensorInfo
from loadstone.checkpoint.workers import in_threads, own_stream
from loadstone.errors import CheckpointError
from loadstone.telemetry import Progress

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of manifest and weights file; entries of another are not found
MANIFEST, WEIGHTS, USED = "manifest.json", "weights.safetensors", "used"
STRETCH = 16 << 20  # bytes read, or brought into memory, at a time
TORCH_TYPES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "BOOL": "bool",
}  # fmt: skip
PADDING = "padding."  # tensors of this name only move the next one to an aligned place


class DamagedError(Exception):
    """An entry is not what its manifest says; `str()` says how."""


@dataclass(frozen=True)
class Kind:
    """What an entry is, apart from the weights' content: parts, shapes, strategy, layout, type of the products."""

    facts: Mapping[str, Any]

    @property
    def id(self) -> str:
        """A name for this kind."""
        return digest_of_facts({"format": FORMAT, **self.facts})[:32]

    def key(self, digests: Mapping[str, str]) -> str:
        """Return the key of the entry of this kind for a checkpoint whose tensors have these digests."""
        return digest_of_facts({"kind": self.id, "tensors": dict(digests)})[:32]


@dataclass(frozen=True)
class Manifest:
    """What an entry says of itself.

    `source` are the digests of the checkpoint's tensors, `tensors` those of the entry's own; `parts` maps each part to
    its tensors and facts. `boot` is the start of the system in which its bytes were last known to be whole.
    """

    key: str
    kind: str
    name: str
    origin: str
    revision: str | None
    strategy: str
    layout: str
    made: float
    source_bytes: int
    weights_bytes: int
    source: Mapping[str, str]
    tensors: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Any]]
    boot: str
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def read(cls, stream: Any) -> Manifest:
        """Return the manifest that an open file holds; raise DamagedError when it holds none."""
        try:
            content = json.loads(stream.read())
            return cls(**content)
        except (ValueError, TypeError) as error:
            raise DamagedError(f"its manifest cannot be read: {error}") from error


@dataclass(frozen=True)
class Entry:
    """One entry in its folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def at(cls, folder: Path) -> Entry:
        """Return the entry in `folder`; raise OSError when there is none, DamagedError when it is not whole."""
        with (folder / MANIFEST).open("rb") as stream:
            return cls(folder, Manifest.read(stream))

    @property
    def weights(self) -> Path:
        """The file with the entry's tensors."""
        return self.folder / WEIGHTS

    @property
    def nbytes(self) -> int:
        """The bytes that the entry takes on disk; 0 when it is gone."""
        return size_of(self.folder)

    @property
    def last_used(self) -> float:
        """When the entry was last attached, or else made; seconds since the epoch."""
        try:
            return (self.folder / USED).stat().st_mtime
        except OSError:
            return self.manifest.made

    def header(self) -> dict[str, TensorInfo]:
        """Return what the weights file has, having checked it against the manifest; raise DamagedError."""
        try:
            found = safetensors.read_header(self.weights)
        except CheckpointError as error:
            raise DamagedError(error.message) from error
        named = {name: tensor for name, tensor in found.items() if not name.startswith(PADDING)}
        if named.keys() != self.manifest.tensors.keys():
            raise DamagedError("its weights file does not have the tensors that its manifest names")
        if self.weights.stat().st_size != self.manifest.weights_bytes:
            raise DamagedError("its weights file is not as large as its manifest says")
        return named

    def verify(self) -> None:
        """Read all of it and compare every tensor with its digest; raise DamagedError naming those that differ.

        Emits `store.progress` after each stretch.
        """
        header, wrong = self.header(), []
        about = {"phase": "verify", "model": self.manifest.name, "strategy": self.manifest.strategy}
        progress = Progress("store.progress", sum(one.nbytes for one in header.values()), len(header), **about)
        with FileReader(self.weights) as reader:

            def check(tensor: TensorInfo, buffer: Buffer) -> None:
                found = Digest()
                for start, length in _stretches(tensor.nbytes):
                    found.update(reader.read(tensor.offset + start, length, buffer).numpy())
                    progress.add(length, is_last_of_tensor=start + length == tensor.nbytes)
                if found.hex() != self.manifest.tensors[tensor.name]:
                    wrong.append(tensor.name)

            largest_first = sorted(header.values(), key=lambda tensor: -tensor.nbytes)
            in_threads(largest_first, check, buffer_bytes=STRETCH)
        if wrong:
            raise DamagedError(f"bytes of {', '.join(sorted(wrong)[:5])} have changed")

    def load(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the entry's tensors copied to `device`, through buffers that it can copy from by itself."""
        import torch

        header = self.header()
        found = {
            name: torch.empty(tensor.shape, dtype=getattr(torch, TORCH_TYPES[tensor.dtype]), device=device)
            for name, tensor in header.items()
        }
        flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in found.items()}
        tasks = [(tensor, *stretch) for tensor in header.values() for stretch in _stretches(tensor.nbytes)]
        with FileReader(self.weights) as reader:

            def copy(task: tuple[TensorInfo, int, int], buffer: Buffer) -> None:
                tensor, start, length = task
                raw = reader.read(tensor.offset + start, length, buffer)
                flat[tensor.name][start : start + length].copy_(raw, non_blocking=True)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()  # the buffer is used again

            in_threads(
                tasks, copy, buffer_bytes=STRETCH, is_pinned=device.type == "cuda", around=lambda: own_stream(device)
            )
        return found


def size_of(folder: Path) -> int:
    """Return the bytes that the files in a folder take, as far as they are there."""
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            total += file.stat().st_size
    return total


def _stretches(nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of the stretches that a tensor is read in."""
    for start in range(0, nbytes, STRETCH):
        yield start, min(STRETCH, nbytes - start)
