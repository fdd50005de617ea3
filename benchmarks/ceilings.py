"""What a device can do at most, as torch reaches it: bytes read a second, and operations of products a second.

    python -m benchmarks.ceilings [cpu|cuda]

Decoding one stream is bound by the first, reading long prompts by the others. An operation is one multiplication or one
addition. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

READ_BYTES = 1 << 30
READ_PASSES = 8
ROWS, COLUMNS, INNER = 512, 18_944, 3584  # the largest matrix of the 7B shapes, and a part of a prompt
PRODUCT_PASSES = 5
ENOUGH_S = 5.0  # of products of one type, where they are slow


def measure_ceilings(device: str) -> dict[str, object]:
    """Return the ceilings of a device; a product that torch does not have there is None."""
    import torch

    from loadstone.hardware.cpu import usable_cores

    torch.set_num_threads(usable_cores())
    return {
        "device": device,
        "read_bytes_per_s": read_ceiling(device),
        "bf16_operations_per_s": product_ceiling(torch.bfloat16, device),
        "int8_operations_per_s": product_ceiling(torch.int8, device),
    }


def read_ceiling(device: str = "cpu") -> float:
    """Return the bytes a second at which torch sums a tensor far larger than the caches: the best of several passes."""
    import torch

    from loadstone.hardware import memory_limits

    free_bytes = torch.cuda.mem_get_info()[0] if device == "cuda" else memory_limits().free_bytes
    numbers = torch.ones(min(READ_BYTES, free_bytes // 8) // 4, device=device)
    return numbers.nbytes / _best(numbers.sum, READ_PASSES, device)


def product_ceiling(kind: torch.dtype, device: str = "cpu") -> float | None:
    """Return the operations a second of one large product of matrices of a type, the best of several passes."""
    import torch

    def numbers(rows: int, columns: int) -> torch.Tensor:
        if kind == torch.int8:
            return torch.randint(-127, 128, (rows, columns), dtype=kind, device=device)
        return torch.randn(rows, columns, dtype=kind, device=device)

    x, w = numbers(ROWS, INNER), numbers(COLUMNS, INNER).t()
    multiply = torch._int_mm if kind == torch.int8 else torch.mm
    try:
        best = _best(lambda: multiply(x, w), PRODUCT_PASSES, device)
    except (RuntimeError, NotImplementedError):
        return None
    return 2 * ROWS * COLUMNS * INNER / best


def _best(work: Callable[[], object], passes: int, device: str) -> float:
    """Return the seconds of the quickest pass, after one that warms up."""
    import torch

    best, begun = float("inf"), time.perf_counter()
    for number in range(passes + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if number:
            best = min(best, now - started)
            if now - begun > ENOUGH_S:
                break
    return best


if __name__ == "__main__":
    print(json.dumps(measure_ceilings(sys.argv[1] if len(sys.argv) > 1 else "cpu")))
