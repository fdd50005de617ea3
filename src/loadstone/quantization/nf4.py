"""Strategy `4bit`: NF4 with blocks of 64 (QLoRA, Dettmers et al. 2023) for the layers, 8 bits for embedding and head.

On CUDA the weights are bitsandbytes' own, absmax doubly quantised, multiplied by its kernels. On the CPU the codes
are the same and the absmax has 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Facts, Packing
from .codes import BLOCK, NF4
from .four_bits import FourBits
from .turning import wide_kernels

if TYPE_CHECKING:
    import torch

    from loadstone.checkpoint.coding import Coding
    from loadstone.checkpoint.quantized.coded import Coded

    from .kernels.cpu import CpuKernels
    from .linear import Linear


LARGEST = 2.0**15  # what the largest absmax is kept as: near float16's own largest, so that small ones keep theirs


class Nf4(FourBits):
    """Keeps the layers' matrices in NF4, and what maps tokens in and out as `FourBits` says."""

    name = "4bit"
    summary = "NF4, 4.25 bits a weight in the layers; embedding and head in 8 bits"
    beside = 2

    def packing_in_four(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Packing:
        if device.type == "cuda":
            from ._bitsandbytes import BitsandbytesPacking

            return BitsandbytesPacking(rows, columns, device, dtype)
        if device.type == "cpu" and (kernels := wide_kernels()) is not None:
            return _TurnedPacking(rows, columns, kernels, dtype)
        return _Nf4Packing(rows, columns, device, dtype)

    def keeps(self, coding: Coding) -> bool:
        return coding.kind == "nf4"

    def layout_in_four(self, device_kind: str) -> str:
        if device_kind == "cuda":
            return "bitsandbytes-nf4-double-1"
        return "nf4-64-absmax16-turned-1" if device_kind == "cpu" and wide_kernels() else "nf4-64-absmax16-1"

    def restore_in_four(self, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> Linear:
        from .linear import Nf4Linear, TurnedNf4Linear

        if "absmax2" in tensors:
            from ._bitsandbytes import BitsandbytesNf4

            return BitsandbytesNf4.restore(tensors, facts, dtype)
        if "turned" in tensors:
            return TurnedNf4Linear(
                tensors["turned"], tensors["turned_absmax"], facts["scale"], int(facts["rows"]), dtype
            )  # fmt: skip
        return Nf4Linear(tensors["codes"], tensors["absmax"], facts["scale"], dtype)


class _Nf4Packing(Packing):
    """Codes as they will be, and absmax as float32 until the largest is known."""

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        import torch

        from .kernels.cpu import cpu_kernels

        self.codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        self.absmax = torch.empty(rows, columns // BLOCK)
        self.device = device
        self.dtype = dtype
        self.kernels = cpu_kernels()

    def add(self, first: int, rows: torch.Tensor) -> None:
        from .reference import quantize_nf4

        part = slice(first, first + len(rows))
        if self.kernels is not None:
            self.kernels.quantize_nf4(rows, self.codes[part], self.absmax[part])
        else:
            self.codes[part], self.absmax[part] = quantize_nf4(rows)

    def add_coded(self, first: int, rows: Coded) -> None:
        if (found := nf4_of(rows)) is None:
            super().add_coded(first, rows)
            return
        part = slice(first, first + len(found[0]))
        self.codes[part], self.absmax[part] = found

    def finish(self) -> Linear:
        from .linear import Nf4Linear

        absmax, scale = narrowed(self.absmax)
        return Nf4Linear(self.codes.to(self.device), absmax.to(self.device), scale, self.dtype)


class _TurnedPacking(Packing):
    """The same, turned for the wide products."""

    def __init__(self, rows: int, columns: int, kernels: CpuKernels, dtype: torch.dtype) -> None:
        import torch

        from .turned import turned_space

        self.rows, self.dtype, self.kernels = rows, dtype, kernels
        self.turned = turned_space(rows, columns // 2, torch.uint8)
        self.absmax = torch.empty(rows, columns // BLOCK)

    def add(self, first: int, rows: torch.Tensor) -> None:
        from .turned import turn_in_strips

        def quantize(part: torch.Tensor, codes: torch.Tensor, where: slice) -> None:
            self.kernels.quantize_nf4(part, codes, self.absmax[where])

        turn_in_strips(self.kernels, rows, self.turned, first, quantize)

    def add_coded(self, first: int, rows: Coded) -> None:
        if (found := nf4_of(rows)) is None:
            super().add_coded(first, rows)
            return
        codes, self.absmax[first : first + len(found[0])] = found
        self.kernels.turn(codes, self.turned, first)

    def finish(self) -> Linear:
        from .linear import TurnedNf4Linear
        from .turned import turned_scales

        absmax, scale = narrowed(self.absmax)
        return TurnedNf4Linear(self.turned, turned_scales(absmax), scale, self.rows, self.dtype)


def nf4_of(rows: Coded) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return codes and absmax (float32) of rows that are NF4 in blocks of 64; None where they are anything else."""
    import torch

    from loadstone.checkpoint.quantized.coded import TableRows

    if not isinstance(rows, TableRows) or rows.codes.shape[1] * 2 != rows.absmax.shape[1] * BLOCK:
        return None
    is_nf4 = torch.allclose(rows.table, torch.tensor(NF4), rtol=0, atol=1e-6)
    return (rows.codes, rows.absmax) if is_nf4 else None


def narrowed(absmax: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return absmax in 16 bits, and the scale of all of it; `absmax` is overwritten."""
    # One NaN or infinity spoils its own block only, and one huge weight leaves the others' absmax its eleven bits.
    scale = float(absmax.where(absmax.isfinite(), 0).max()) / LARGEST or 1.0
    return absmax.div_(scale).half(), scale
