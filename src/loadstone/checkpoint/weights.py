"""Reads tensors from a checkpoint's files: views of them where the format allows, else unpacked numbers.

The files are mapped, not read: a page comes from the disk when a number on it is first touched. torch and
numpy are imported on first use, so that looking at a spec needs neither.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from loadstone.errors import CheckpointError, ModelLoadError

from .gguf import BLOCKS
from .spec import ModelSpec, TensorInfo

if TYPE_CHECKING:
    import torch

_warnings_lock = threading.Lock()


def open_weights(spec: ModelSpec) -> Weights:
    """Return the weights of `spec`, opened for reading.

    Raises CheckpointError when a file is gone or shorter than its header said.
    """
    return Weights(spec)


class Weights:
    """The tensors of one checkpoint, by the Hub's names; safe to read from several threads.

    Views that `read` returned keep their file mapped, even after `close`. A file must not be shortened
    meanwhile: the system then ends the process that touches the missing pages.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._maps: dict[Path, mmap.mmap] = {}
        self._is_closed = False
        ends: dict[Path, int] = {}
        for tensor in spec.tensors.values():
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
        for file, end in ends.items():
            self._maps[file] = _map(file, end)

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order of the computation."""
        return tuple(self._spec.tensors)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return the tensor called `name`, or some of its rows, in torch's shape.

        BF16, F16 and F32 come in their own type as views of the file, at no cost in memory; never write into
        them. GGUF's quantised types come as float32, and what its converter reordered comes in the Hub's
        order: both are new memory. Raises KeyError for an unknown name and ModelLoadError after `close`.
        """
        tensor = self._spec.tensors[name]
        if self._is_closed:
            raise ModelLoadError(f"the weights of {self._spec.name} are closed; open them again")
        order = self._stored_rows(tensor)
        if tensor.dtype in BLOCKS and BLOCKS[tensor.dtype][0] > 1:
            return _unpack(tensor, self._maps[tensor.file], order, rows)
        view = _view(tensor, self._maps[tensor.file])
        if order is not None:
            return view[order if rows is None else order[rows]]
        return view if rows is None else view[rows]

    def prefetch(self, name: str) -> None:
        """Ask the system to start reading the tensor called `name` from the disk; return at once."""
        self._advise(name, "MADV_WILLNEED", outwards=True)

    def release(self, name: str) -> None:
        """Let the system take back the memory that holds the pages of `name`; they can be read again."""
        self._advise(name, "MADV_DONTNEED", outwards=False)

    def close(self) -> None:
        """Let go of the files; views that were handed out stay valid and keep theirs."""
        self._is_closed = True
        self._maps.clear()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _advise(self, name: str, advice: str, *, outwards: bool) -> None:
        tensor = self._spec.tensors[name]
        mapping = self._maps.get(tensor.file)
        option = getattr(mmap, advice, None)
        if mapping is None or option is None:
            return  # advice only: without it the pages come and go as the system likes
        start, end = tensor.offset, tensor.offset + tensor.nbytes
        page = mmap.PAGESIZE
        # Pages at the edges hold parts of the neighbours: wanted when fetching, spared when letting go.
        start = start // page * page if outwards else -(-start // page) * page
        end = min(-(-end // page) * page, len(mapping)) if outwards else end // page * page
        if end > start:
            mapping.madvise(option, start, end - start)

    def _stored_rows(self, tensor: TensorInfo) -> torch.Tensor | None:
        """Where each of the Hub's rows lies in the file, or None when they lie in order.

        llama.cpp's converter interleaves the two halves of each head of q and k, because it rotates
        neighbours where the Hub's models rotate halves.
        """
        spec = self._spec
        if spec.format != "gguf" or not spec.architecture.gguf_permutes_rope:
            return None
        heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(tensor.name.split(".")[-2])
        if heads is None:
            return None
        import torch

        places = torch.arange(tensor.shape[0]).view(heads, spec.head_size // 2, 2)
        return places.transpose(1, 2).reshape(-1)


def _map(file: Path, end: int) -> mmap.mmap:
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < end:
                raise CheckpointError(
                    f"it is truncated: it has {size} bytes and {end - size} are missing", file=file,
                    hint="It changed since it was looked at: download it again.",
                )  # fmt: skip
            try:
                # Private: a write by mistake changes a copy of a page, not the file, and ends no process.
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:
                # A system that counts private mappings as memory may refuse a large one.
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror or error}", file=file) from error


def _dtypes() -> Mapping[str, torch.dtype]:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _view(tensor: TensorInfo, mapping: mmap.mmap) -> torch.Tensor:
    import torch

    dtype = _dtypes()[tensor.dtype]
    if tensor.offset % dtype.itemsize:
        # Legal in the format, but vector instructions may not take it: this one is copied.
        data = bytearray(mapping[tensor.offset : tensor.offset + tensor.nbytes])
        return torch.frombuffer(data, dtype=dtype).view(tensor.shape)
    with _no_warning_when_read_only(mapping):
        numbers = torch.frombuffer(mapping, dtype=dtype, count=tensor.elements, offset=tensor.offset)
    return numbers.view(tensor.shape)


@contextmanager
def _no_warning_when_read_only(mapping: mmap.mmap) -> Iterator[None]:
    if not memoryview(mapping).readonly:
        yield
        return
    # torch warns that such a tensor must not be written to; `read` says so itself.
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        yield


def _unpack(tensor: TensorInfo, mapping: mmap.mmap, order: torch.Tensor | None, rows: slice | None) -> torch.Tensor:
    import numpy as np
    import torch

    from ._gguf import dequantize

    block, block_bytes = BLOCKS[tensor.dtype]
    columns = tensor.shape[-1]
    packed = np.frombuffer(mapping, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
    packed = packed.reshape(-1, columns // block * block_bytes)
    if order is not None:  # whole rows move, so they may move while they are packed
        packed = packed[(order if rows is None else order[rows]).numpy()]
    elif rows is not None:
        packed = packed[rows]
    numbers = torch.from_numpy(dequantize(packed, tensor.dtype))
    return numbers if len(tensor.shape) == 2 else numbers.view(-1)
