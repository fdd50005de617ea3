"""What this machine is, and how fast its memory can be read: the ceiling of any decoder at batch 1."""

from __future__ import annotations

import json
import platform

from .ceilings import read_ceiling


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


if __name__ == "__main__":
    print(json.dumps(describe_machine()))
