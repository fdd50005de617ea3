"""Writes a checkpoint of safetensors piece by piece: of no tensor more than a piece is in memory.

Files get their names when all of them are whole, so a folder never has half a checkpoint. Knows no model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from loadstone.errors import ResourceError
from loadstone.units import format_size

INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A tensor that is to be written; `pieces` gives its numbers from the first to the last."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return prod(self.shape) * self.dtype.itemsize


def write_checkpoint(folder: Path, tensors: Sequence[Written], most: int) -> None:
    """Write the tensors into `folder`, in files of `most` bytes or of one tensor, with an index when there are several.

    What an earlier checkpoint of such names left there goes. Raises ResourceError where the disk has no room, OSError
    where it cannot be written.
    """
    total = sum(one.nbytes for one in tensors)
    if (free := shutil.disk_usage(folder).free) < total:
        raise ResourceError(
            f"{folder} has {format_size(free)} free, and the checkpoint takes {format_size(total)}.",
            needed=total, allowed=free, hint="Make room there, or choose another folder.",
        )  # fmt: skip
    shards = _divided(tensors, most)
    names = [_WHOLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    parts = [folder / f"{name}.part" for name in names]
    try:
        for part, shard in zip(parts, shards, strict=True):
            _write(part, shard)
        for file in [*folder.iterdir()]:
            if _OURS.fullmatch(file.name):
                file.unlink()
        for part, name in zip(parts, names, strict=True):
            part.replace(folder / name)
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    if len(shards) > 1:
        places = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _divided(tensors: Sequence[Written], most: int) -> list[list[Written]]:
    shards: list[list[Written]] = [[]]
    room = most
    for one in tensors:
        if shards[-1] and one.nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(one)
        room -= one.nbytes
    return shards


def _write(file: Path, tensors: Sequence[Written]) -> None:
    # Larger numbers first: every tensor then begins at a multiple of its own numbers' size.
    ordered = sorted(tensors, key=lambda one: -one.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in ordered:
        places = [end, end := end + one.nbytes]
        header[one.name] = {"dtype": _TYPES[one.dtype], "shape": [*one.shape], "data_offsets": places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for one in ordered:
            written = sum(stream.write(_bytes_of(piece, one.dtype)) for piece in one.pieces())
            if written != one.nbytes:
                raise ValueError(f"{one.name} came to {written} bytes, and must have {one.nbytes}")


def _bytes_of(piece: torch.Tensor, dtype: torch.dtype) -> Any:
    flat = piece.detach().to("cpu", dtype).contiguous().view(-1)
    return flat.view(torch.uint8).numpy()
