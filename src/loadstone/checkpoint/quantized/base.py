"""The seam of formats of quantised checkpoints: what config.json says, which tensors make a weight, and their bytes.

A `Method` is one way to quantise, as `quantization_config` of config.json names it: it finds the tensors of each weight
in the headers and checks their types and shapes. A `Layout` is how the bytes of such a weight lie: it says which
stretches of files make some rows, and turns them into codes, a few rows at a time, so that a weight never stands in
memory as numbers. Knows no strategy: what is kept in the end is decided elsewhere. torch comes in with the first
weight that is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from loadstone.checkpoint.coding import Coding, Quantized
from loadstone.checkpoint.pieces import Piece, rows_of, whole
from loadstone.checkpoint.spec import TensorInfo
from loadstone.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from .coded import Coded

SCALES = ("BF16", "F16", "F32")
PIECE_NUMBERS = 8 << 20  # numbers in a piece, where its rows lie together
STRIP_NUMBERS = 1 << 18  # numbers that are taken apart at a time: they stay in the core's cache
_ANOTHER = "Fetch the checkpoint again, or use the original one and choose `quantization`."


class Settings:
    """`quantization_config`, read strictly: what is not as it must be is a CheckpointError that names the key."""

    def __init__(self, values: Mapping[str, Any], file: Path, place: str = "quantization_config") -> None:
        self.values, self.file, self.place = values, file, place

    def count(self, key: str, known: Sequence[int], default: int | None = None) -> int:
        """Return a whole number that is one of `known`."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value not in known:
            self.refuse(f"{key} is {value!r}; read are {', '.join(map(str, known))}")
        return value

    def group_size(self, default: int | None = None) -> int:
        """Return how many columns share a scale, 0 for all of a row."""
        value = self.values.get("group_size")
        value = default if value is None else value
        if value in (-1, 0) and type(value) is int:
            return 0
        if type(value) is not int or not 8 <= value <= 2**20 or value % 8:
            self.refuse(f"group_size is {value!r}; it must be -1 or a multiple of 8")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(f"{key} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """Return a text that is one of `known`, in small letters."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value.lower() not in known:
            self.refuse(f"{key} is {value!r}; read are {', '.join(known)}")
        return value.lower()

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; nothing where there is none."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.refuse(f"{key} is not a list of names")
        return tuple(value)

    def refuse(self, reason: str) -> NoReturn:
        """Raise CheckpointError, saying that this is in `quantization_config`."""
        raise CheckpointError(f"{self.place}: {reason}", file=self.file, hint=_ANOTHER)


class Module:
    """The tensors that a checkpoint has of one matrix, by what follows the module's name in theirs.

    `shape` is the matrix's own, rows × columns, as the sizes of the model ask for.
    """

    def __init__(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> None:
        self.name, self.tensors = name, tensors
        self.rows, self.columns = shape

    def has(self, suffix: str) -> bool:
        """Tell whether there is a tensor with this suffix."""
        return suffix in self.tensors

    def take(self, suffix: str, types: Sequence[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """Return a tensor of one of these types, and of one of these shapes where any are given.

        It is called by its suffix. Raises CheckpointError when it is missing or not as it must be.
        """
        tensor = self.tensors.get(suffix)
        if tensor is None:
            there = ", ".join(sorted(self.tensors))
            place = next(iter(self.tensors.values())).file
            raise CheckpointError(f"{self.name}: {suffix!r} is missing beside {there}", file=place, hint=_ANOTHER)
        if tensor.dtype not in types:
            self.refuse(f"{suffix!r} is of type {tensor.dtype}; it must be {' or '.join(types)}", tensor)
        if shapes and tensor.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self.refuse(f"{suffix!r} has shape {list(tensor.shape)}; it must be {wanted}", tensor)
        return replace(tensor, name=suffix)

    def weight(self, dtype: str, coding: Coding, parts: Iterable[TensorInfo]) -> TensorInfo:
        """Return the matrix, made from `parts`; the first of them has its codes."""
        made = tuple(parts)
        codes = made[0]
        return TensorInfo(
            f"{self.name}.weight", (self.rows, self.columns), dtype, codes.file, codes.offset,
            sum(part.nbytes for part in made), codes.stored_name, coding=coding, parts=made,
        )  # fmt: skip

    def refuse(self, reason: str, tensor: TensorInfo | None = None) -> NoReturn:
        """Raise CheckpointError for this matrix."""
        place = (tensor or next(iter(self.tensors.values()))).file
        raise CheckpointError(f"{self.name}: {reason}", file=place, hint=_ANOTHER)


class Method(ABC):
    """A way to quantise, as one checkpoint used it; made from its `Settings`."""

    about: Quantized

    @abstractmethod
    def __init__(self, settings: Settings) -> None:
        """Read what config.json says; raise CheckpointError for what is not read."""

    @abstractmethod
    def find(self, module: Module) -> TensorInfo | None:
        """Return the matrix that a module's tensors make, or None where it was not converted.

        Types and shapes are checked, nothing is read. Raises CheckpointError for what is not as it must be.
        """


class Layout(ABC):
    """How the bytes of a quantised matrix lie in its parts."""

    @abstractmethod
    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        """Yield the pieces of a matrix, each with one stretch for every part. Arithmetic alone."""

    @abstractmethod
    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        """Yield the codes of a few rows of `piece` at a time, and which of its rows the first of them is.

        `raw` are the bytes of its stretches (uint8), and what is yielded may be views of them. Raises CheckpointError
        for bytes that cannot be meant.
        """


def row_pieces(tensor: TensorInfo, *by_row: str) -> Iterator[Piece]:
    """Yield pieces of some rows each: those parts' bytes that belong to these rows, and the other parts whole."""
    rows, columns = tensor.shape
    step = max(1, PIECE_NUMBERS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        stretches = [rows_of(part, first, count, rows) if part.name in by_row else whole(part) for part in tensor.parts]
        yield Piece(tensor, first, count, tuple(stretches))


def whole_piece(tensor: TensorInfo) -> Iterator[Piece]:
    """Yield the only piece of a matrix whose rows do not lie together."""
    yield Piece(tensor, 0, tensor.shape[0], tuple(map(whole, tensor.parts)))


def strip_rows(piece: Piece) -> Iterator[slice]:
    """Yield a few rows of a piece at a time, counted from its first."""
    step = max(1, STRIP_NUMBERS // piece.tensor.shape[1])
    for first in range(0, piece.count, step):
        yield slice(first, min(first + step, piece.count))


def by_part(piece: Piece, raw: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the bytes of a piece by the names of their parts."""
    return {part.name: one for part, one in zip(piece.tensor.parts, raw, strict=True)}


def viewed(raw: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return bytes as numbers of a type; a copy where they do not lie as the type wants."""
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def damaged(tensor: TensorInfo, reason: str) -> NoReturn:
    """Raise CheckpointError for bytes of a weight that cannot be meant."""
    raise CheckpointError(
        f"tensor {tensor.stored_name!r}: {reason}", file=tensor.file, hint="The file is damaged: download it again."
    )
