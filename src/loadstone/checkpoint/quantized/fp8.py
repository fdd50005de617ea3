"""FP8 weights (E4M3) with one scale for all, one a row, or one a block of rows and columns.

Written by DeepSeek's and Qwen's own scripts and transformers (`quant_method: fp8`, `weight_scale_inv` for blocks of
128 × 128), by FBGEMM (`fbgemm_fp8`), and by llm-compressor (`compressed.py`). In spite of its name `weight_scale_inv`
multiplies. Processors have no product for such numbers, so their rows are kept in another form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loadstone.checkpoint.coding import OTHER, Coding, Quantized
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo

from .base import SCALES, Layout, Method, Module, Settings, by_part, row_pieces, strip_rows, viewed

if TYPE_CHECKING:
    import torch

    from .coded import Coded

TYPE = "F8_E4M3"
_SCALE_NAMES = ("weight_scale_inv", "weight_scale")


class Fp8(Method):
    """`quant_method: fp8` and `fbgemm_fp8`."""

    def __init__(self, settings: Settings) -> None:
        method = settings.text("quant_method", ("fp8", "fbgemm_fp8"))
        settings.text("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        self.block = block_of(settings, settings.values.get("weight_block_size"))
        note = "one scale a block of {} × {}".format(*self.block) if self.block[0] else ""
        self.about = Quantized(method, "FP8 (E4M3)", 8, left_out=settings.names("modules_to_not_convert"), note=note)

    def find(self, module: Module) -> TensorInfo | None:
        return find_fp8(module, self.block)


def block_of(settings: Settings, value: object) -> tuple[int, int]:
    """Return the rows and columns of a block that `value` says, (0, 0) where it says none."""
    if value is None:
        return 0, 0
    if not isinstance(value, list) or len(value) != 2 or any(type(one) is not int or one < 1 for one in value):
        settings.refuse(f"the size of a block is {value!r}; it must be two whole numbers above 0")
    return value[0], value[1]


def find_fp8(module: Module, block: tuple[int, int]) -> TensorInfo | None:
    """Return the matrix that FP8 numbers and their scales make, None where a module has no such numbers."""
    if not module.has("weight") or module.tensors["weight"].dtype != TYPE:
        return None
    weight = module.take("weight", (TYPE,), (module.rows, module.columns))
    name = next((one for one in _SCALE_NAMES if module.has(one)), "weight_scale")
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1), (module.rows,), (module.rows, 1)]
    if block[0]:
        shapes.append((-(-module.rows // block[0]), -(-module.columns // block[1])))
    scale = module.take(name, SCALES, *shapes)
    is_by_block = bool(block[0]) and scale.shape == shapes[-1]
    coding = Coding(OTHER, "fp8", 8, block=block if is_by_block else (0, 0))
    return module.weight(TYPE, coding, (weight, scale))


class Fp8Rows(Layout):
    """E4M3 row by row, and the scales, which are few."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return row_pieces(tensor, "weight")

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import FLOATS, PlainRows

        tensor = piece.tensor
        assert tensor.coding is not None
        (codes, scale), info = by_part(piece, raw).values(), tensor.parts[1]
        scales = viewed(scale, FLOATS[info.dtype], *info.shape).float()
        # Looking a byte up is nearly twice as fast as torch's own conversion.
        meant = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes.view(piece.count, tensor.shape[1])
        for rows in strip_rows(piece):
            places = torch.arange(piece.first + rows.start, piece.first + rows.stop)
            yield rows.start, PlainRows(torch.take(meant, codes[rows].long()).mul_(_of_rows(scales, places, tensor)))


def _of_rows(scales: torch.Tensor, rows: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
    """Return the scales of some rows, as they multiply them."""
    assert tensor.coding is not None
    height, width = tensor.coding.block
    if height:
        return scales[rows // height].repeat_interleave(width, 1)[:, : tensor.shape[1]]
    return scales.view(-1) if scales.numel() == 1 else scales.view(-1, 1)[rows]
