"""bitsandbytes: NF4 and FP4 (QLoRA, Dettmers et al. 2023), absmax doubly quantised or not, and LLM.int8()'s 8 bits.

The names of tensors are those of `QuantState.as_dict(packed=True)` and `Linear8bitLt`. In 4 bits a matrix is coded as
one row of all its numbers, in blocks that may go on from one row to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.checkpoint.coding import INT8, NF4, OTHER, Coding, Quantized
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo

from .base import (
    Layout,
    Method,
    Module,
    Settings,
    by_part,
    damaged,
    row_pieces,
    strip_rows,
    viewed,
    whole_piece,
)  # fmt: skip

if TYPE_CHECKING:
    import torch

    from .coded import Coded

_STATE = "weight.quant_state.bitsandbytes__"
_STATE_BYTES = 4096  # more than any state takes
_STORAGE = ("U8", "I8", "BF16", "F16", "F32")  # `bnb_4bit_quant_storage`: the same bytes under another type
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LARGEST = 1e30  # far above any offset; NaN is not below it
_OURS = 64  # numbers in a block of absmax, as NF4 is kept here


class Bitsandbytes(Method):
    """`quant_method: bitsandbytes`."""

    def __init__(self, settings: Settings) -> None:
        is_4bit = settings.flag("load_in_4bit", settings.flag("_load_in_4bit"))
        is_8bit = settings.flag("load_in_8bit", settings.flag("_load_in_8bit"))
        if is_4bit == is_8bit:
            settings.refuse("it must say either load_in_4bit or load_in_8bit")
        left_out = settings.names("llm_int8_skip_modules")
        self.is_4bit = is_4bit
        if is_8bit:
            self.about = Quantized("bitsandbytes", "bitsandbytes", 8, 0, left_out=left_out)
            return
        kind = settings.text("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        self.about = Quantized("bitsandbytes", f"bitsandbytes {kind.upper()}", 4, _OURS, left_out=left_out)

    def find(self, module: Module) -> TensorInfo | None:
        if not self.is_4bit:
            return self._find_int8(module) if module.has("SCB") else None
        kind = next((kind for kind in ("nf4", "fp4") if module.has(_STATE + kind)), None)
        return None if kind is None else self._find_4bit(module, kind)

    def _find_int8(self, module: Module) -> TensorInfo:
        weight = module.take("weight", ("I8",), (module.rows, module.columns))
        scales = module.take("SCB", ("F32",), (module.rows,))
        return module.weight("INT8", Coding(INT8, "bitsandbytes-int8", 8), (weight, scales))

    def _find_4bit(self, module: Module, kind: str) -> TensorInfo:
        numbers = module.rows * module.columns
        weight = module.take("weight", _STORAGE)
        if weight.nbytes * 2 != numbers + numbers % 2:
            module.refuse(f"'weight' has {weight.nbytes} bytes; {numbers} numbers of 4 bits have {-(-numbers // 2)}")
        state = module.take(_STATE + kind, ("U8",))
        if state.nbytes > _STATE_BYTES:
            module.refuse(f"its quant_state claims {state.nbytes} bytes, above the limit of {_STATE_BYTES}", state)
        is_nested = module.has("weight.nested_absmax")
        absmax = module.take("weight.absmax", ("U8",) if is_nested else ("F32",))
        blocks = absmax.elements
        block = next((one for one in _BLOCKS if -(-numbers // one) == blocks), None)
        if block is None:
            module.refuse(
                f"'weight.absmax' has {blocks} numbers, which fit {numbers} numbers in no known blocks", absmax
            )
        parts = [weight, absmax, module.take("weight.quant_map", ("F32",), (16,)), state]
        if is_nested:
            nested = module.take("weight.nested_absmax", ("F32",))
            if not 1 <= nested.elements <= blocks:
                module.refuse(f"'weight.nested_absmax' has {nested.elements} numbers for {blocks} blocks", nested)
            parts += [nested, module.take("weight.nested_quant_map", ("F32",), (256,))]
        # NF4 in blocks that are several of ours is NF4 in ours, each with the scale of the larger.
        is_ours = kind == "nf4" and block % _OURS == 0 and module.columns % block == 0
        coding = Coding(NF4 if is_ours else OTHER, f"bitsandbytes-{kind}", 4, block)
        return module.weight(kind.upper(), coding, parts)


@dataclass(frozen=True)
class _State:
    """What the JSON beside a weight says, checked."""

    block: int
    nested_block: int
    offset: float


class FourBits(Layout):
    """NF4 or FP4: codes, absmax, the table of 16 values, the state as JSON; where absmax is nested, its own two."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        assert tensor.coding is not None
        if tensor.shape[1] % tensor.coding.group:
            return whole_piece(tensor)  # blocks go on from row to row
        return row_pieces(tensor, "weight", "weight.absmax")

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import TableRows

        tensor, parts = piece.tensor, by_part(piece, raw)
        assert tensor.coding is not None
        columns, block = tensor.shape[1], tensor.coding.group
        state = _read_state(tensor, raw)
        table = viewed(parts["weight.quant_map"], torch.float32, 16)
        codes, absmax = parts["weight"], self._absmax(piece, parts, state)
        if columns % block:
            yield from _straddling(piece, codes, absmax, table, block)
            return
        codes, absmax = codes.view(piece.count, columns // 2), absmax.view(piece.count, columns // block)
        if tensor.coding.kind == NF4:
            absmax = absmax.repeat_interleave(block // _OURS, 1)
        for rows in strip_rows(piece):
            yield rows.start, TableRows(codes[rows], absmax[rows], table)

    @staticmethod
    def _absmax(piece: Piece, parts: dict[str, torch.Tensor], state: _State) -> torch.Tensor:
        """Return the scale of each block of a piece, float32."""
        import torch

        tensor = piece.tensor
        absmax = parts["weight.absmax"]
        if "weight.nested_absmax" not in parts:
            return viewed(absmax, torch.float32, -1)
        assert tensor.coding is not None
        first = piece.first * tensor.shape[1] // tensor.coding.group
        nested = viewed(parts["weight.nested_absmax"], torch.float32, -1)
        table = viewed(parts["weight.nested_quant_map"], torch.float32, 256)
        places = torch.arange(first, first + len(absmax)) // state.nested_block
        if places[-1] >= len(nested):
            damaged(tensor, f"its nested_absmax has {len(nested)} numbers, too few for blocks of {state.nested_block}")
        return table[absmax.int()].mul_(nested[places]).add_(state.offset)


class Int8(Layout):
    """LLM.int8(): int8, and for each row the largest magnitude, which 127 stands for."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return row_pieces(tensor, "weight", "SCB")

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import Int8Rows

        values = viewed(raw[0], torch.int8, piece.count, piece.tensor.shape[1])
        scales = viewed(raw[1], torch.float32, piece.count) / 127
        for rows in strip_rows(piece):
            yield rows.start, Int8Rows(values[rows], scales[rows])


def _straddling(
    piece: Piece, codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, block: int
) -> Iterator[tuple[int, Coded]]:
    """Yield rows of a whole matrix whose blocks go on from row to row, as numbers."""
    import torch

    from .coded import PlainRows

    columns = piece.tensor.shape[1]
    for rows in strip_rows(piece):
        places = torch.arange(rows.start * columns, rows.stop * columns)
        two = codes[places // 2].int()
        found = torch.where(places % 2 == 0, two >> 4, two & 15)
        yield rows.start, PlainRows((table[found] * absmax[places // block]).view(-1, columns))


def _read_state(tensor: TensorInfo, raw: Sequence[torch.Tensor]) -> _State:
    """Return what a weight's quant_state says; raise CheckpointError where it says something else than the headers."""
    index = next(number for number, part in enumerate(tensor.parts) if part.name.startswith(_STATE))
    said = _parsed(tensor, bytes(raw[index].numpy()))
    assert tensor.coding is not None
    block = said.get("blocksize")
    if block != tensor.coding.group:
        damaged(tensor, f"its quant_state says blocks of {block!r}, its absmax is for blocks of {tensor.coding.group}")
    if said.get("shape") != list(tensor.shape):
        damaged(tensor, f"its quant_state says shape {_short(said.get('shape'))}; it must be {list(tensor.shape)}")
    if said.get("quant_type") != tensor.coding.layout.rpartition("-")[2]:
        damaged(tensor, f"its quant_state says quant_type {_short(said.get('quant_type'))}")
    nested, offset = said.get("nested_blocksize", 256), said.get("nested_offset", 0.0)
    if type(nested) is not int or not 1 <= nested <= 2**20:
        damaged(tensor, f"its quant_state says nested_blocksize {_short(nested)}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < _LARGEST:
        damaged(tensor, f"its quant_state says nested_offset {_short(offset)}")
    return _State(tensor.coding.group, nested, float(offset))


def _parsed(tensor: TensorInfo, text: bytes) -> dict[str, Any]:
    try:
        said = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        damaged(tensor, f"its quant_state is not valid JSON: {error}")
    if not isinstance(said, dict):
        damaged(tensor, "its quant_state is not a JSON object")
    return said


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
