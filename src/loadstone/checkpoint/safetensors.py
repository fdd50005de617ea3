"""Reads the headers of .safetensors files, trusting nothing in them.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format"). Every claim of the header is compared with the file's
size before anything is allocated. Knows nothing of models or of torch; `weights.py` reads the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from loadstone.errors import CheckpointError

from .opening import LocalFile, Readable
from .spec import TensorInfo

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
_LENGTH_BYTES = 8
_MOST_DIMENSIONS = 16
_LFS_POINTER = b"version https://git-lfs"
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


def read_header(file: Path, remote: Readable | None = None) -> Mapping[str, TensorInfo]:
    """Return what the header of `file` says about each tensor, in the order of their bytes.

    Every offset is within the file, no two tensors overlap and no byte is left over. Raises CheckpointError
    naming the file and the cause otherwise. `remote` gives its bytes where it is not on this machine.
    """
    try:
        with LocalFile(file) if remote is None else nullcontext(remote) as opened:
            size = opened.size
            raw = _raw_header(file, opened)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}", file=file) from error
    entries = _parse(file, raw)
    data_start = _LENGTH_BYTES + len(raw)
    tensors = [_tensor(file, name, entry, data_start) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_places(file, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def _raw_header(file: Path, opened: Readable) -> bytes:
    """Return the JSON of a header, once its length is believed."""
    start = opened.read(0, len(_LFS_POINTER))
    if opened.size < _LENGTH_BYTES:
        _damaged(file, f"it has {opened.size} bytes, fewer than the 8 that every safetensors file starts with")
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    _check_length(file, length, opened.size, start)
    raw = opened.read(_LENGTH_BYTES, length)
    if len(raw) < length:
        _damaged(file, f"its header ended after {len(raw)} of {length} bytes")
    return raw


def _damaged(file: Path, reason: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(reason, file=file, hint="The file is damaged or incomplete: download it again.") from cause


def _check_length(file: Path, length: int, size: int, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            "it is a Git LFS pointer, not the weights", file=file, hint="Run `git lfs pull` in its folder."
        )
    if length > size - _LENGTH_BYTES:
        _damaged(file, f"its header claims {length} bytes, but only {size - _LENGTH_BYTES} follow")
    if length > HEADER_LIMIT:
        _damaged(file, f"its header claims {length} bytes, above the format's limit of {HEADER_LIMIT}")
    if length < 2:
        _damaged(file, f"its header claims {length} bytes, too few for JSON")


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise ValueError(f"{twice!r} appears twice")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        _damaged(file, f"its header is not UTF-8: {error.reason} at byte {error.start}", error)
    except RecursionError as error:
        _damaged(file, "its header is nested too deeply", error)
    except ValueError as error:
        _damaged(file, f"its header is not valid JSON: {error}", error)
    if not isinstance(entries, dict):
        _damaged(file, f"its header is a JSON {type(entries).__name__}, not an object")
    return entries


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _damaged(file, f"tensor {name!r}: its entry is not an object")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        _damaged(file, f"tensor {name!r}: its entry lacks {', '.join(missing)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _damaged(file, f"tensor {name!r}: its type {_short(dtype)} is not known")
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        _damaged(file, f"tensor {name!r}: its shape {_short(shape)} is not a short list of counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(file, f"tensor {name!r}: its data_offsets {_short(offsets)} are not [begin, end]")
    begin, end = offsets
    bits = _BITS[dtype]
    for length in shape:
        bits *= length
    if bits != 8 * (end - begin):
        _damaged(
            file,
            f"tensor {name!r}: {dtype} {shape} needs {bits / 8:.16g} bytes, its offsets span {end - begin}",
        )
    return TensorInfo(name, tuple(shape), dtype, file, data_start + begin, end - begin, name)


def _counts(value: Any) -> bool:
    # 2^63 keeps products small enough to multiply at no cost; a bool is an int in Python, not in JSON.
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _check_places(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    expected = data_start
    for tensor in tensors:
        if tensor.offset < expected:
            _damaged(file, f"tensor {tensor.name!r} overlaps the one before it")
        if tensor.offset > expected:
            _damaged(file, f"{tensor.offset - expected} bytes before tensor {tensor.name!r} belong to no tensor")
        expected = tensor.offset + tensor.nbytes
    if expected > size:
        _damaged(file, f"it is truncated: it has {size} bytes and {expected - size} are missing")
    if expected < size:
        _damaged(file, f"{size - expected} bytes after the last tensor belong to no tensor")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no repr
        return "(too long to show)"
    return text if len(text) <= 80 else text[:77] + "..."
