"""Whether weights are to be turned (`turned.py`). Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kernels.cpu import CpuKernels


def wide_kernels() -> CpuKernels | None:
    """Return our CPU kernels where they want weights turned."""
    from .kernels.cpu import cpu_kernels

    kernels = cpu_kernels()
    return kernels if kernels is not None and kernels.is_wide else None
