"""GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel pack it.

`qweight` is int32, columns/8 × rows for 4 bits: a word has eight columns of W, for one row, the first in its lowest
bits. `qzeros` is int32, groups × rows/8, and `scales` groups × rows. `g_idx` is the group of each column: with
act-order columns are in groups by how much they mattered, and not side by side. W = (code - zero) · scale, where the
first version of the format (`checkpoint_format: gptq`) has zeros one less than they are, and the second (`gptq_v2`) as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loadstone.checkpoint.coding import GROUPED, OTHER, Coding, Quantized
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo

from .base import SCALES, Layout, Method, Module, Settings, by_part, strip_rows, viewed, whole_piece

if TYPE_CHECKING:
    import torch

    from .coded import Coded


class Gptq(Method):
    """`quant_method: gptq`."""

    def __init__(self, settings: Settings) -> None:
        if settings.values.get("dynamic"):
            settings.refuse("dynamic: settings that differ from module to module are not read")
        key = "checkpoint_format" if settings.values.get("checkpoint_format") else "format"
        version = settings.text(key, ("gptq", "gptq_v2"), "gptq")
        self.layout = "gptq" if version == "gptq" else "gptq-2"
        self.about = Quantized(
            "gptq", "GPTQ", settings.count("bits", (4, 8)), settings.group_size(128),
            is_symmetric=settings.flag("sym", True), is_reordered=settings.flag("desc_act"),
            left_out=settings.names("modules_to_not_convert"),
        )  # fmt: skip

    def find(self, module: Module) -> TensorInfo | None:
        if not module.has("qweight"):
            return None
        about, word = self.about, 32 // self.about.bits
        if module.rows % word or module.columns % word:
            module.refuse(f"it is {module.rows} × {module.columns}; GPTQ packs multiples of {word}")
        group = about.group or module.columns
        groups = -(-module.columns // group)
        parts = [
            module.take("qweight", ("I32",), (module.columns // word, module.rows)),
            module.take("qzeros", ("I32",), (groups, module.rows // word)),
            module.take("scales", SCALES, (groups, module.rows)),
        ]
        if about.is_reordered or module.has("g_idx"):
            parts.append(module.take("g_idx", ("I32",), (module.columns,)))
        kind = OTHER if module.columns % group else GROUPED  # the last group may have fewer columns
        coding = Coding(
            kind, self.layout, about.bits, 0 if groups == 1 else group,
            is_symmetric=about.is_symmetric, is_reordered=about.is_reordered and groups > 1,
        )  # fmt: skip
        return module.weight(f"GPTQ{about.bits}", coding, parts)


class GptqWords(Layout):
    """A matrix stands on its side, and so is one piece; `offset` is what is added to stored zeros."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return whole_piece(tensor)

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import FLOATS, GroupedRows
        from .unpacking import column_groups, unpack_across, unpack_down

        tensor, parts = piece.tensor, by_part(piece, raw)
        assert tensor.coding is not None
        rows, bits = tensor.shape[0], tensor.coding.bits
        words = viewed(parts["qweight"], torch.int32, -1, rows)
        zeros = unpack_across(viewed(parts["qzeros"], torch.int32, -1, rows * bits // 32), bits)
        scales = viewed(parts["scales"], FLOATS[tensor.parts[2].dtype], -1, rows)
        order = column_groups(tensor, parts["g_idx"], len(scales)) if "g_idx" in parts else None
        for some in strip_rows(piece):
            codes = unpack_down(words[:, some], bits).T.contiguous()
            zero = zeros[:, some].T.float().add_(self.offset)
            yield some.start, GroupedRows(codes, scales[:, some].T.float().contiguous(), zero, order)
