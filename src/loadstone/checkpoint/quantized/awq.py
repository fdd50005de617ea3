"""AWQ (Lin et al. 2023), as AutoAWQ's `gemm` version packs it.

`qweight` is int32, columns × rows/8: a word has eight rows of W, for one column, in the order 0, 2, 4, 6, 1, 3, 5, 7
from its lowest bits on. `qzeros` is packed alike, for each group of columns; `scales` is float16, groups × rows.
W = (code - zero) · scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loadstone.checkpoint.coding import GROUPED, Coding, Quantized
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo

from .base import SCALES, Layout, Method, Module, Settings, by_part, strip_rows, viewed, whole_piece

if TYPE_CHECKING:
    import torch

    from .coded import Coded

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight rows is
_WORD = 8  # codes


class Awq(Method):
    """`quant_method: awq`."""

    def __init__(self, settings: Settings) -> None:
        settings.text("version" if settings.values.get("version") else "format", ("gemm",), "gemm")
        self.about = Quantized(
            "awq", "AWQ", settings.count("bits", (4,), 4), settings.group_size(128),
            is_symmetric=not settings.flag("zero_point", True), left_out=settings.names("modules_to_not_convert"),
        )  # fmt: skip

    def find(self, module: Module) -> TensorInfo | None:
        if not module.has("qweight"):
            return None
        if module.rows % _WORD:
            module.refuse(f"it has {module.rows} rows; AWQ packs a multiple of {_WORD}")
        group = self.about.group or module.columns
        if module.columns % group:
            module.refuse(f"it has {module.columns} columns, which are no whole number of groups of {group}")
        groups = module.columns // group
        parts = (
            module.take("qweight", ("I32",), (module.columns, module.rows // _WORD)),
            module.take("qzeros", ("I32",), (groups, module.rows // _WORD)),
            module.take("scales", SCALES, (groups, module.rows)),
        )
        coding = Coding(GROUPED, "awq", 4, 0 if groups == 1 else group, is_symmetric=self.about.is_symmetric)
        return module.weight("AWQ", coding, parts)


class AwqWords(Layout):
    """A matrix stands on its side, and so is one piece."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return whole_piece(tensor)

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import FLOATS, GroupedRows

        parts = by_part(piece, raw)
        rows, columns = piece.tensor.shape
        words = viewed(parts["qweight"], torch.int32, columns, rows // _WORD)
        zeros = viewed(parts["qzeros"], torch.int32, -1, rows // _WORD)
        scales = viewed(parts["scales"], FLOATS[piece.tensor.parts[2].dtype], -1, rows)
        for some in _whole_words(strip_rows(piece), rows):
            these = slice(some.start // _WORD, some.stop // _WORD)
            codes, zero = rows_of_words(words[:, these]), rows_of_words(zeros[:, these])
            yield some.start, GroupedRows(codes, scales[:, some].T.float().contiguous(), zero.float())


def _whole_words(strips: Iterator[slice], rows: int) -> Iterator[slice]:
    """Yield strips that begin and end where words do."""
    ends = dict.fromkeys(-(-strip.stop // _WORD) * _WORD for strip in strips)
    first = 0
    for end in ends:
        yield slice(first, min(end, rows))
        first = end


def rows_of_words(words: torch.Tensor) -> torch.Tensor:
    """Return the codes of words (columns × words) as rows of W: (words · 8) × columns, uint8."""
    import torch

    shifts = torch.tensor([4 * place for place in _PLACES], dtype=torch.int32).view(1, -1, 1)
    codes = (words.T.unsqueeze(1) >> shifts) & 15
    return codes.to(torch.uint8).flatten(0, 1)
