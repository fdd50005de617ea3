"""Reads the headers of .gguf files (version 2 and 3), trusting nothing in them.

A file is a magic number, a version, counts, typed metadata, a table of tensors, and their bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every count and length is compared with the
file's size before it is followed, and nothing is read beyond the file. Long lists, such as a vocabulary, are
passed over and decoded when asked for. Knows nothing of models: `gguf_model.py` gives the metadata its
meaning. Unpacking quantised numbers is the `gguf` package's work, in `_gguf.py`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from loadstone.errors import CheckpointError

from .opening import Readable
from .spec import TensorInfo

# number: (name, numbers in a block, bytes of a block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
READABLE_TYPES = tuple(name for name, _, _ in TENSOR_TYPES.values())
BLOCKS = {name: (numbers, length) for name, numbers, length in TENSOR_TYPES.values()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # ggml's own limit
_DEEPEST_LIST = 3
_LEAST_ENTRY, _LEAST_TENSOR = 13, 32  # bytes that an entry of either table takes at least
_SMALLEST = 24  # bytes that come before the tables
_LEAST_FETCHED = 2**20  # bytes, after the first: what follows has a vocabulary in it


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file says: metadata by key, and tensors by the name they are stored under.

    `opened` gives the file's bytes.
    """

    file: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    opened: Readable = field(repr=False, compare=False)


def read_header(file: Path, remote: Readable | None = None) -> GgufHeader:
    """Return the header of `file`, every place in it checked against the file's size.

    A tensor of a type that is not read keeps its type's number, as "type 19", with `nbytes` 0. Raises
    CheckpointError naming the file and the cause. `remote` gives its bytes where it is not on this machine.
    """
    opened = _map(file) if remote is None else remote
    if opened.size < _SMALLEST:
        _damaged(file, f"it has {opened.size} bytes, too few for a GGUF file")
    cursor = _Cursor(file, opened)
    if cursor.take(4) != b"GGUF":
        _damaged(file, "it does not start with GGUF")
    version = cursor.unpack("I")
    if version and version & 0xFFFF == 0:
        raise CheckpointError("it is big-endian, which is not read", file=file, hint="Use a little-endian file.")
    if version not in (2, 3):
        raise CheckpointError(
            f"it is GGUF version {version}; read are 2 and 3", file=file, hint="Use a newer conversion."
        )
    tensor_count, entry_count = cursor.count(_LEAST_TENSOR), cursor.count(_LEAST_ENTRY)
    metadata = _Metadata(cursor)
    for _ in range(entry_count):
        key = cursor.name()
        if key in metadata:
            _damaged(file, f"metadata {key!r} appears twice")
        metadata.add(key)
    tensors = _tensors(cursor, tensor_count, _alignment(metadata, file))
    return GgufHeader(file, version, metadata, tensors, opened)


def read_metadata(file: Path) -> Mapping[str, Any]:
    """Return the metadata of `file` by key: numbers, booleans, text, and lists (decoded at each read)."""
    return read_header(file).metadata


def _damaged(file: Path, reason: str) -> NoReturn:
    raise CheckpointError(reason, file=file, hint="The file is damaged or incomplete: download it again.")


class _Mapped:
    """A file on this machine, mapped."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)

    def read(self, start: int, length: int) -> bytes:
        return self.data[start : start + length]


class _Cursor:
    """A place in a file's bytes that moves forward and never past the end.

    `data` is the file from its start, as far as it was needed; of a mapped file it is all.
    """

    def __init__(self, file: Path, opened: Readable, data: mmap.mmap | bytes = b"", place: int = 0) -> None:
        self.file = file
        self.opened = opened
        self.data = opened.data if isinstance(opened, _Mapped) else data
        self.size = opened.size
        self.place = place

    def at(self, place: int) -> _Cursor:
        """Return another cursor in the same file."""
        return _Cursor(self.file, self.opened, self.data, place)

    def fetch(self, end: int) -> None:
        """Have the bytes before `end`, which is within the file: at least twice as many as before, so few times."""
        wanted = min(self.size, max(end, 2 * len(self.data), _LEAST_FETCHED if self.data else 0))
        self.data = self.opened.read(0, wanted)
        if len(self.data) < end:
            _damaged(self.file, f"it ended after {len(self.data)} of {self.size} bytes")

    def skip(self, length: int) -> None:
        if length > self.size - self.place:
            missing = self.place + length - self.size
            _damaged(self.file, f"it is truncated or damaged: its header goes on {missing} bytes past its end")
        self.place += length

    def take(self, length: int) -> bytes:
        start = self.place
        self.skip(length)
        if self.place > len(self.data):
            self.fetch(self.place)
        return self.data[start : self.place]

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """Read how many things follow, each of at least `least` bytes."""
        number: int = self.unpack("Q")
        if number * least > self.size - self.place:
            _damaged(self.file, f"it is truncated or damaged: {number} entries cannot follow at byte {self.place}")
        return number

    def text(self) -> str:
        return self.take(self.unpack("Q")).decode("utf-8", "replace")

    def name(self) -> str:
        start = self.place
        try:
            return self.take(self.unpack("Q")).decode("utf-8")
        except UnicodeDecodeError:
            _damaged(self.file, f"the name at byte {start} of its header is not UTF-8")

    # A vocabulary has hundreds of thousands of texts: tight loops, without calls to the methods above.

    def texts(self, count: int) -> list[str]:
        start = self.place
        self.skip_texts(count)
        length, self.place = self.place - start, start
        data, place = self.take(length), 0
        read = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            first = place + 8
            place = first + read(data, place)[0]
            found.append(data[first:place].decode("utf-8", "replace"))
        return found

    def skip_texts(self, count: int) -> None:
        data, size, place = self.data, self.size, self.place
        here = len(data)
        read = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if place + 8 > here:
                if place + 8 > size:
                    break
                self.fetch(place + 8)
                data, here = self.data, len(self.data)
            place += 8 + read(data, place)[0]
        else:
            if place <= size:
                self.place = place
                return
        _damaged(self.file, "it is truncated or damaged: a list of texts in its header goes on past its end")


class _Metadata(Mapping[str, Any]):
    """The metadata of a file; lists are kept as places and decoded each time they are read."""

    def __init__(self, cursor: _Cursor) -> None:
        self._cursor = cursor
        self._values: dict[str, Any] = {}
        self._lists: dict[str, int] = {}

    def add(self, key: str) -> None:
        cursor = self._cursor
        kind = cursor.unpack("I")
        if kind == _ARRAY:
            self._lists[key] = cursor.place
            _skip_list(cursor, key)
        self._values[key] = None if kind == _ARRAY else _value(cursor, kind, key)

    def __getitem__(self, key: str) -> Any:
        if key not in self._lists:
            return self._values[key]
        return _list(self._cursor.at(self._lists[key]), key)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def scalars(self) -> dict[str, Any]:
        """Everything but the lists."""
        return {key: value for key, value in self._values.items() if key not in self._lists}


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind not in _SCALARS:
        _damaged(cursor.file, f"metadata {key!r} has the unknown type {kind}")
    return cursor.unpack(_SCALARS[kind])


def _list_start(cursor: _Cursor, key: str) -> tuple[int, int]:
    kind = cursor.unpack("I")
    least = {_STRING: 8, _ARRAY: 12}.get(kind) or (kind in _SCALARS and struct.calcsize("<" + _SCALARS[kind]))
    if not least:
        _damaged(cursor.file, f"metadata {key!r} is a list of the unknown type {kind}")
    return kind, cursor.count(least)


def _skip_list(cursor: _Cursor, key: str, depth: int = 1) -> None:
    kind, count = _list_start(cursor, key)
    if kind == _STRING:
        cursor.skip_texts(count)
    elif kind in _SCALARS:
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]))
    elif depth == _DEEPEST_LIST:
        _damaged(cursor.file, f"metadata {key!r} nests lists more than {_DEEPEST_LIST} deep")
    else:
        for _ in range(count):
            _skip_list(cursor, key, depth + 1)


def _list(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = _list_start(cursor, key)
    if kind == _STRING:
        return cursor.texts(count)
    if kind == _ARRAY:
        return [_list(cursor, key) for _ in range(count)]
    code = f"<{count}{_SCALARS[kind]}"
    return list(struct.unpack(code, cursor.take(struct.calcsize(code))))


def _alignment(metadata: Mapping[str, Any], file: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        _damaged(file, f"general.alignment is {alignment!r}; it must be a power of two")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.name()
        dimensions = cursor.unpack("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            _damaged(cursor.file, f"tensor {name!r} has {dimensions} dimensions")
        # The file lists the fastest-running dimension first, torch lists it last.
        shape = tuple(cursor.unpack("Q") for _ in range(dimensions))[::-1]
        if name in entries:
            _damaged(cursor.file, f"tensor {name!r} appears twice")
        entries[name] = (shape, cursor.unpack("I"), cursor.unpack("Q"))
    data_start = -(-cursor.place // alignment) * alignment
    tensors = {name: _tensor(cursor.file, name, entry, data_start, alignment) for name, entry in entries.items()}
    _check_places(cursor.file, tensors, cursor.size)
    return tensors


def _tensor(
    file: Path, name: str, entry: tuple[tuple[int, ...], int, int], data_start: int, alignment: int
) -> TensorInfo:
    shape, kind, offset = entry
    if 0 in shape:
        _damaged(file, f"tensor {name!r} has the empty shape {list(shape)}")
    if offset % alignment:
        _damaged(file, f"tensor {name!r} starts at {offset}, which is not a multiple of {alignment}")
    if kind not in TENSOR_TYPES:
        return TensorInfo(name, shape, f"type {kind}", file, data_start + offset, 0, name)
    dtype, block, block_bytes = TENSOR_TYPES[kind]
    if shape[-1] % block:
        _damaged(file, f"tensor {name!r} has rows of {shape[-1]} numbers; {dtype} keeps blocks of {block}")
    nbytes = block_bytes * (shape[-1] // block)
    for length in shape[:-1]:
        nbytes *= length
    return TensorInfo(name, shape, dtype, file, data_start + offset, nbytes, name)


def _check_places(file: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda one: one.offset):
        if tensor.offset < end:
            _damaged(file, f"tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if end > size:
        _damaged(file, f"it is truncated: it has {size} bytes and {end - size} are missing")


def _map(file: Path) -> _Mapped:
    try:
        with file.open("rb") as stream:
            if stream.seek(0, 2) < _SMALLEST:  # one of no bytes cannot be mapped
                _damaged(file, f"it has {stream.tell()} bytes, too few for a GGUF file")
            return _Mapped(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}", file=file) from error
