"""Reads tensors from a checkpoint's files, a piece at a time: rows of them as they are, or unpacked numbers.

Nothing is mapped and nothing is kept: a piece is read into a buffer of the caller's, which several threads do at once,
each with its own. torch and numpy are imported on first use, so that looking at a spec needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from loadstone.errors import CheckpointError, ModelLoadError

from .disk import PAGE, Buffer, FileReader
from .gguf import BLOCKS
from .pieces import Piece, plain_pieces
from .quantized import layout_of, pieces_of
from .spec import ModelSpec, TensorInfo

if TYPE_CHECKING:
    import torch

    from .quantized.coded import Coded

# Numbers in a piece. What is unpacked is several times as large in memory as in its file, so it comes in smaller ones.
PIECE_NUMBERS = 8 << 20
PIECE_NUMBERS_PACKED = 1 << 20


def open_weights(spec: ModelSpec) -> Weights:
    """Return the weights of `spec`, opened for reading.

    Raises CheckpointError when a file is gone or shorter than its header said.
    """
    if any(tensor.digest is not None for tensor in spec.tensors.values()):
        raise CheckpointError(
            f"the original weights of {spec.name} were not kept", file=spec.folder,
            hint="Load or pull it once more: they are fetched again.",
        )  # fmt: skip
    return Weights(spec)


class Weights:
    """The tensors of one checkpoint, by the Hub's names; safe to read from several threads."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._files: dict[Path, FileReader] = {}
        ends: dict[Path, int] = {}
        for tensor in _stored(spec):
            ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
        with ExitStack() as opened:
            for file, end in ends.items():
                self._files[file] = opened.enter_context(FileReader(file))
                _check_size(file, end)
            self._opened = opened.pop_all()

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, in the order of the computation."""
        return tuple(self._spec.tensors)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return the pieces of the tensor called `name`, in order."""
        tensor = self._spec.tensors[name]
        if tensor.coding is not None:
            return tuple(pieces_of(tensor))
        rows = tensor.shape[0]
        limit = PIECE_NUMBERS_PACKED if _is_packed(tensor) else PIECE_NUMBERS
        step = rows if self._is_reordered(tensor) else max(1, limit // (tensor.elements // rows))
        return tuple(plain_pieces(tensor, step))

    @property
    def piece_bytes(self) -> int:
        """How large a buffer the largest piece wants."""
        return max(room_of(piece) for name in self.names() for piece in self.pieces(name))

    def read(self, piece: Piece, buffer: Buffer) -> tuple[torch.Tensor, ...]:
        """Return the bytes of each stretch of `piece` as its file has them, in `buffer`.

        Raises CheckpointError when a file is shorter than it was, and ModelLoadError after `close`.
        """
        if not self._files:
            raise ModelLoadError(f"the weights of {self._spec.name} are closed; open them again")
        found, start = [], 0
        for one in piece.stretches:
            found.append(self._files[one.file].read(one.offset, one.nbytes, buffer.behind(start)))
            start += _paged(one.nbytes)
        return tuple(found)

    def coded(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        """Yield the codes of a piece of a matrix that is quantised already, a few rows at a time, each time with the
        first row's number in the piece. They are good as long as `raw`, the bytes of the piece.

        Raises CheckpointError for bytes that cannot be meant.
        """
        return layout_of(piece.tensor).strips(piece, raw)

    def numbers(self, piece: Piece, raw: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the numbers that the bytes of `piece` mean, rows × columns or a list of numbers.

        BF16, F16 and F32 are views of `raw`, good as long as that; GGUF's packed types and what is quantised already
        come as float32, and what GGUF's converter reordered comes in the Hub's order: all of these are new memory.
        """
        import torch

        tensor = piece.tensor
        if tensor.coding is not None:
            return torch.cat([rows.numbers() for _, rows in self.coded(piece, raw)])
        (found,) = raw
        shape = (piece.count, *tensor.shape[1:])
        order = self._stored_rows(tensor) if self._is_reordered(tensor) else None
        if _is_packed(tensor):
            return _unpack(tensor, found, order).view(shape)
        dtype = float_types()[tensor.dtype]
        if found.storage_offset() % dtype.itemsize:
            found = found.clone()  # legal in the format, but vector instructions may not take it
        found = found.view(dtype).view(shape)
        return found if order is None else found[order]

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole tensor called `name` in memory of its own."""
        import torch

        pieces = self.pieces(name)
        buffer = Buffer(max(map(room_of, pieces)))
        return torch.cat([self.numbers(piece, self.read(piece, buffer)).clone() for piece in pieces])

    def close(self) -> None:
        """Let go of the files."""
        self._files = {}
        self._opened.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_reordered(self, tensor: TensorInfo) -> bool:
        """Tell whether rows lie in the file in another order than the Hub's.

        llama.cpp's converter interleaves the two halves of each head of q and k, because it rotates neighbours where
        the Hub's models rotate halves.
        """
        spec = self._spec
        is_converted = spec.format == "gguf" and spec.architecture.gguf_permutes_rope
        return is_converted and tensor.name.split(".")[-2] in ("q_proj", "k_proj")

    def _stored_rows(self, tensor: TensorInfo) -> torch.Tensor:
        """Where each of the Hub's rows lies in the file."""
        import torch

        places = torch.arange(tensor.shape[0]).view(-1, self._spec.head_size // 2, 2)
        return places.transpose(1, 2).reshape(-1)


def room_of(piece: Piece) -> int:
    """Return how large a buffer a piece wants: each of its stretches begins on a page of its own."""
    *others, last = piece.stretches
    return sum(_paged(one.nbytes) for one in others) + last.nbytes


def _paged(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE + PAGE


def _stored(spec: ModelSpec) -> Iterator[TensorInfo]:
    """Yield the tensors as they are in files."""
    for tensor in spec.tensors.values():
        yield from tensor.parts or (tensor,)


def _check_size(file: Path, end: int) -> None:
    size = file.stat().st_size
    if size < end:
        raise CheckpointError(
            f"it is truncated: it has {size} bytes and {end - size} are missing", file=file,
            hint="It changed since it was looked at: download it again.",
        )  # fmt: skip


def _is_packed(tensor: TensorInfo) -> bool:
    return tensor.dtype in BLOCKS and BLOCKS[tensor.dtype][0] > 1


def float_types() -> Mapping[str, torch.dtype]:
    """Return torch's types of the numbers that are read as they are, by their names on disk."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _unpack(tensor: TensorInfo, raw: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    import torch

    from ._gguf import dequantize

    block, block_bytes = BLOCKS[tensor.dtype]
    packed = raw.view(-1, tensor.shape[-1] // block * block_bytes)
    if order is not None:
        packed = packed[order]  # whole rows move, so they may move while they are packed
    return torch.from_numpy(dequantize(packed.numpy(), tensor.dtype))
