"""Free memory of an NVIDIA GPU as its driver tells it, through pynvml where that is installed (`nvidia-ml-py`).

Asking torch takes a context on the GPU, and with it some hundred megabytes that then are not free.
"""

from __future__ import annotations

from loadstone.telemetry import emit


def free_bytes(uuid: str) -> int | None:
    """Return the bytes that are free on the GPU with this identity, as torch has it; None where nobody tells."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return _free(pynvml, uuid)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:  # no driver, or one that does not tell, as where memory is the processor's too
        emit("hardware.nvml", reason=str(error))
        return None


def _free(pynvml: object, uuid: str) -> int | None:
    """Return the free bytes of a GPU, or of a slice of one, which has an identity of its own."""
    for kind in ("GPU", "MIG"):
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")  # type: ignore[attr-defined]
        except pynvml.NVMLError:  # type: ignore[attr-defined]
            continue
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)  # type: ignore[attr-defined]
    return None
