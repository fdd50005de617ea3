"""What this machine is, and how fast its memory can be read: the ceiling of any decoder at batch 1."""

from __future__ import annotations

import json
import platform
import time

CEILING_BYTES = 1 << 30
CEILING_PASSES = 8


def describe_machine() -> dict[str, object]:
    """Return processor, cores, memory, versions, and the memory's read ceiling in bytes a second."""
    import torch

    from loadstone.hardware import memory_limits
    from loadstone.hardware.cpu import processor_name, usable_cores

    torch.set_num_threads(usable_cores())
    return {
        "cpu": processor_name(),
        "cores": usable_cores(),
        "memory_bytes": memory_limits().limit_bytes,
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "read_bytes_per_s": read_ceiling(),
    }


def read_ceiling() -> float:
    """Return the bytes a second at which torch sums a tensor far larger than the caches: the best of several passes."""
    import torch

    from loadstone.hardware import memory_limits

    count = min(CEILING_BYTES, memory_limits().free_bytes // 8) // 4
    numbers = torch.ones(count)
    best = float("inf")
    for _ in range(CEILING_PASSES):
        started = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - started)
    return numbers.nbytes / best


if __name__ == "__main__":
    print(json.dumps(describe_machine()))
