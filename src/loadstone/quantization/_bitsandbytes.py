"""The one place that calls bitsandbytes: its NF4 and int8 products (CUDA), and its NF4 dequantisation (any CPU).

Imported only when one of them is needed, because importing bitsandbytes takes over a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch
from bitsandbytes import matmul_4bit

from .base import Facts, Packing
from .codes import BLOCK
from .linear import Linear


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights, rows × columns, for codes rows × columns/2 and a float32 absmax rows × columns/64."""
    shape = (codes.shape[0], codes.shape[1] * 2)
    flat = codes.contiguous().view(-1, 1)
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        flat, absmax.contiguous().view(-1), BLOCK, "nf4", shape, dtype
    )
    return found


def int8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return x·Wᵀ with x rounded to 8 bits a row, as LLM.int8() does without outliers."""
    numbers, x_scales, _ = bitsandbytes.int8_vectorwise_quant(x.half())
    whole = bitsandbytes.int8_linear_matmul(numbers, weight)
    result: torch.Tensor = bitsandbytes.int8_mm_dequant(whole, x_scales, scales * 127.0)
    return result.to(x.dtype)


class BitsandbytesNf4(Linear):
    """W as bitsandbytes keeps it: NF4 codes, and absmax quantised once more to 8 bits."""

    def __init__(self, codes: torch.Tensor, state: Any) -> None:
        super().__init__(*state.shape)
        self.codes = codes
        self.state = state

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> BitsandbytesNf4:
        """Quantise a whole weight where it is; its type is the compute type."""
        codes, state = bitsandbytes.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        return cls(codes, state)

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Facts, dtype: torch.dtype) -> BitsandbytesNf4:
        """Return the weight whose `tensors()` and `facts` these are."""
        nested = bitsandbytes.QuantState(
            absmax=tensors["absmax2"], code=tensors["code2"], blocksize=int(facts["blocksize2"]), dtype=torch.float32
        )
        state = bitsandbytes.QuantState(
            absmax=tensors["absmax"], shape=torch.Size((int(facts["rows"]), int(facts["columns"]))), dtype=dtype,
            code=tensors["code"], blocksize=BLOCK, quant_type="nf4", offset=tensors["offset"].view(()), state2=nested,
        )  # fmt: skip
        return cls(tensors["codes"], state)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = matmul_4bit(x, self.codes.t(), quant_state=self.state)
        return product

    def tensors(self) -> Mapping[str, torch.Tensor]:
        state, nested = self.state, self.state.state2
        return {
            "codes": self.codes, "absmax": state.absmax, "code": state.code, "offset": state.offset.view(1),
            "absmax2": nested.absmax, "code2": nested.code,
        }  # fmt: skip

    @property
    def facts(self) -> Facts:
        return {"rows": self.rows, "columns": self.columns, "blocksize2": self.state.state2.blocksize}

    def _part(self, start: int, stop: int) -> Linear | None:
        state, nested = self.state, self.state.state2
        first, last = start * self.columns, stop * self.columns
        if first % (BLOCK * nested.blocksize):
            return None  # another row's absmax is quantised with the first one's
        blocks = slice(first // BLOCK, last // BLOCK)
        scales = nested.absmax[blocks.start // nested.blocksize : -(-blocks.stop // nested.blocksize)]
        state2 = bitsandbytes.QuantState(
            absmax=scales, code=nested.code, blocksize=nested.blocksize, dtype=nested.dtype
        )  # fmt: skip
        part = bitsandbytes.QuantState(
            absmax=state.absmax[blocks], shape=torch.Size((stop - start, self.columns)), dtype=state.dtype,
            code=state.code, blocksize=BLOCK, quant_type="nf4", offset=state.offset, state2=state2,
        )  # fmt: skip
        return BitsandbytesNf4(self.codes.view(-1, 1)[first // 2 : last // 2], part)

    def rows_of(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (rows × columns/2) and absmax (rows × columns/64, float32) of rows [start, stop)."""
        absmax: torch.Tensor = (
            bitsandbytes.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        )
        return self.codes.view(self.rows, -1)[start:stop], absmax.view(self.rows, -1)[start:stop]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return self._whole()[start:stop].to(dtype)

    def multiply_back(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self._whole().to(y.dtype)

    def _whole(self) -> torch.Tensor:
        whole: torch.Tensor = bitsandbytes.dequantize_4bit(self.codes, self.state)
        return whole


class BitsandbytesPacking(Packing):
    """Rows gathered on the GPU in the compute type, from threads whose copies overlap; quantised there when all are."""

    def __init__(self, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> None:
        self.whole = torch.empty(rows, columns, dtype=dtype, device=device)

    def add(self, first: int, rows: torch.Tensor) -> None:
        self.whole[first : first + len(rows)] = rows.to(self.whole.device, non_blocking=True)
        if self.whole.is_cuda:
            torch.cuda.current_stream(self.whole.device).synchronize()  # the caller uses its buffer again

    def finish(self) -> Linear:
        return BitsandbytesNf4.quantize(self.whole)
