"""The one place that imports the `gguf` package: it unpacks quantised blocks and names types of tensors.

Imported on first use only: the package takes a fifth of a second.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

# The package unpacks 16 rows at a time: rows of this many numbers keep a step in the processor's cache.
_ROW = 16384


def dequantize(rows: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Return the numbers of `rows` (rows × bytes of a row, in blocks of GGUF type `dtype`) as float32."""
    kind = gguf.GGMLQuantizationType[dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rows.size // block_bytes
    step = next(count for count in range(max(1, _ROW // block), 0, -1) if blocks % count == 0)
    # A damaged scale may be NaN or infinite; whoever checks the numbers says so, not numpy.
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(rows.reshape(-1, step * block_bytes), kind)
    return np.ascontiguousarray(numbers, dtype=np.float32).reshape(rows.shape[0], -1)


def type_name(number: int) -> str:
    """Return the name of a GGUF tensor type ("IQ2_XS"), or "type 99" when the package does not know it."""
    try:
        return str(gguf.GGMLQuantizationType(number).name)
    except ValueError:
        return f"type {number}"
