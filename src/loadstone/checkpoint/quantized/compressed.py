"""compressed-tensors, which llm-compressor writes: whole numbers of 4 or 8 bits packed in words or not, and FP8.

`pack-quantized` has `weight_packed`, int32, rows × columns · bits/32, the first column in the lowest bits, with half
the range added so that no code is negative; `weight_scale`, rows × groups; where it is not symmetric
`weight_zero_point`, packed from row to row; with act-order `weight_g_idx`, the group of each column. `int-quantized`
has int8 as `weight`.
W = (code - zero) · scale. Bits and groups are told by the shapes, weight by weight, since a file may mix them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loadstone.checkpoint.coding import GROUPED, INT8, Coding, Quantized
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo

from .base import SCALES, Layout, Method, Module, Settings, by_part, damaged, row_pieces, strip_rows, viewed
from .fp8 import block_of, find_fp8

if TYPE_CHECKING:
    import torch

    from .coded import Coded

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_HEAD_OF_SHAPE = ("I64", "I32")


class Compressed(Method):
    """`quant_method: compressed-tensors`."""

    def __init__(self, settings: Settings) -> None:
        settings.text("format", _FORMATS)
        settings.text("quantization_status", ("compressed", "frozen"), "compressed")
        sparsity = settings.values.get("sparsity_config") or {}
        if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
            settings.refuse("sparsity_config: sparse weights are not read")
        schemes = self._schemes(settings)
        self.block = next((block for one in schemes if (block := _block(one))[0]), (0, 0))
        first = schemes[0]
        bits, is_float = first.count("num_bits", (4, 8)), first.text("type", ("int", "float"), "int") == "float"
        if is_float and bits != 8:
            first.refuse(f"floats of {bits} bits are not read; those of 8 are")
        strategy = first.text("strategy", ("group", "channel", "tensor", "block"), "tensor")
        weights = "FP8" if is_float else f"W{bits}"
        self.about = Quantized(
            "compressed-tensors", f"compressed-tensors {weights}", bits,
            first.group_size(128) if strategy == "group" else 0 if strategy == "channel" else None,
            is_symmetric=first.flag("symmetric", True),
            is_reordered=first.values.get("actorder") in ("group", True), left_out=settings.names("ignore"),
            note="mixed with others" if len(schemes) > 1 else "",
        )  # fmt: skip

    @staticmethod
    def _schemes(settings: Settings) -> list[Settings]:
        """Return what is said of the weights of each group of modules."""
        groups = settings.values.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            settings.refuse("config_groups is missing or empty")
        found = []
        for name, group in groups.items():
            weights: Any = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                settings.refuse(f"config_groups.{name} says nothing of weights")
            found.append(Settings(weights, settings.file, f"{settings.place}.config_groups.{name}.weights"))
        return found

    def find(self, module: Module) -> TensorInfo | None:
        if module.has("weight_packed"):
            return _find_packed(module)
        if module.has("weight") and module.tensors["weight"].dtype == "I8":
            return _find_int8(module)
        return find_fp8(module, self.block)


def _block(scheme: Settings) -> tuple[int, int]:
    return block_of(scheme, scheme.values.get("block_structure"))


def _find_packed(module: Module) -> TensorInfo:
    rows, columns = module.rows, module.columns
    packed = module.take("weight_packed", ("I32",))
    bits = next((bits for bits in (4, 8) if packed.shape == (rows, -(-columns * bits // 32))), None)
    if bits is None:
        wanted = f"{[rows, -(-columns // 8)]} (4 bits) or {[rows, -(-columns // 4)]} (8 bits)"
        module.refuse(f"'weight_packed' has shape {list(packed.shape)}; it must be {wanted}", packed)
    scale = module.take("weight_scale", SCALES)
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == rows else 0
    if not 1 <= groups <= columns or columns % groups:
        module.refuse(
            f"'weight_scale' has shape {list(scale.shape)}, which makes no groups of {columns} columns", scale
        )
    parts = [packed, scale, module.take("weight_shape", _HEAD_OF_SHAPE, (2,))]
    if module.has("weight_zero_point"):
        zero = module.take("weight_zero_point", ("I32", "I8"))
        is_packed = zero.dtype == "I32"
        parts.append(
            module.take("weight_zero_point", ("I32", "I8"), (-(-rows * bits // 32) if is_packed else rows, groups))
        )
    is_reordered = module.has("weight_g_idx")
    if is_reordered:
        parts.append(module.take("weight_g_idx", ("I32",), (columns,)))
    coding = Coding(
        GROUPED, "compressed-packed", bits, 0 if groups == 1 else columns // groups,
        is_symmetric=not module.has("weight_zero_point"), is_reordered=is_reordered and groups > 1,
    )  # fmt: skip
    if bits == 8 and groups == 1 and coding.is_symmetric:
        coding = Coding(INT8, coding.layout, 8)
    return module.weight(f"W{bits}", coding, parts)


def _find_int8(module: Module) -> TensorInfo:
    rows, columns = module.rows, module.columns
    weight = module.take("weight", ("I8",), (rows, columns))
    scale = module.take("weight_scale", SCALES, (), (1,), (rows,), (rows, 1))
    parts = [weight, scale]
    if module.has("weight_zero_point"):
        parts.append(module.take("weight_zero_point", ("I8",), scale.shape))
    is_symmetric = len(parts) == 2
    coding = Coding(INT8 if is_symmetric else GROUPED, "compressed-int8", 8, is_symmetric=is_symmetric)
    return module.weight("W8", coding, parts)


class PackedWords(Layout):
    """Words row by row."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return row_pieces(tensor, "weight_packed", "weight_scale")

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import FLOATS, GroupedRows, Int8Rows
        from .unpacking import column_groups, unpack_across

        tensor, parts = piece.tensor, by_part(piece, raw)
        coding = tensor.coding
        assert coding is not None
        columns, half = tensor.shape[1], 2 ** (coding.bits - 1)
        _check_shape(tensor, parts["weight_shape"])
        words = viewed(parts["weight_packed"], torch.int32, piece.count, -1)
        scales = viewed(parts["weight_scale"], FLOATS[tensor.parts[1].dtype], piece.count, -1).float()
        zeros = _zeros(piece, parts.get("weight_zero_point"), half, scales)
        order = column_groups(tensor, parts["weight_g_idx"], scales.shape[1]) if "weight_g_idx" in parts else None
        for rows in strip_rows(piece):
            codes = unpack_across(words[rows], coding.bits)[:, :columns]
            if coding.kind == INT8:
                yield rows.start, Int8Rows(codes.bitwise_xor(half).view(torch.int8), scales[rows, 0])
            else:
                yield rows.start, GroupedRows(codes, scales[rows], zeros[rows], order)


class PlainInt8(Layout):
    """int8 row by row, with one scale for all of them or one a row."""

    def pieces(self, tensor: TensorInfo) -> Iterator[Piece]:
        return row_pieces(tensor, "weight")

    def strips(self, piece: Piece, raw: Sequence[torch.Tensor]) -> Iterator[tuple[int, Coded]]:
        import torch

        from .coded import FLOATS, GroupedRows, Int8Rows

        tensor = piece.tensor
        values = viewed(raw[0], torch.int8, piece.count, tensor.shape[1])
        here = slice(piece.first, piece.first + piece.count)
        scales = viewed(raw[1], FLOATS[tensor.parts[1].dtype], -1).float().expand(tensor.shape[0])[here]
        zeros = raw[2].view(torch.int8).float().expand(tensor.shape[0])[here] if len(raw) > 2 else None
        for rows in strip_rows(piece):
            if zeros is None:
                yield rows.start, Int8Rows(values[rows], scales[rows])
            else:
                yield rows.start, GroupedRows(values[rows], scales[rows, None], zeros[rows, None])


def _check_shape(tensor: TensorInfo, raw: torch.Tensor) -> None:
    import torch

    said = viewed(raw, torch.int64 if tensor.parts[2].dtype == "I64" else torch.int32, 2).tolist()
    if said != list(tensor.shape):
        damaged(tensor, f"its weight_shape says {said}; it must be {list(tensor.shape)}")


def _zeros(piece: Piece, raw: torch.Tensor | None, half: int, scales: torch.Tensor) -> torch.Tensor:
    """Return the zero of each group of a piece's rows, float32."""
    import torch

    from .unpacking import unpack_down

    if raw is None:
        return torch.full_like(scales, half)
    tensor, groups = piece.tensor, scales.shape[1]
    assert tensor.coding is not None
    here = slice(piece.first, piece.first + piece.count)
    if tensor.parts[3].dtype == "I8":  # as earlier versions wrote them: signed, and not packed
        zeros = raw.view(torch.int8).view(-1, groups)[here].float() + half
        if bool(((zeros < 0) | (zeros >= 2 * half)).any()):
            damaged(tensor, f"a zero point is outside the {2 * half} codes")
        return zeros
    return unpack_down(viewed(raw, torch.int32, -1, groups), tensor.coding.bits)[here].float()
