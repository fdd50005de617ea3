"""Free memory of a GPU: from its driver without a context there, and from torch where the driver does not tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from loadstone.hardware import _nvml, _torch

GB = 10**9
UUID = "01234567-89ab-cdef-0123-456789abcdef"


class FakeError(Exception):
    """What pynvml raises."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver with the GPUs in `gpus` (identity: free bytes); `failing` raises at the first call."""
    about = SimpleNamespace(gpus={f"GPU-{UUID}": 20 * GB}, failing=False, opened=0)

    def init() -> None:
        if about.failing:
            raise FakeError("Driver Not Loaded")
        about.opened += 1

    def handle(uuid: str) -> str:
        if uuid not in about.gpus:
            raise FakeError("Not Found")
        return uuid

    def shut_down() -> None:
        about.opened -= 1

    pynvml = ModuleType("pynvml")
    vars(pynvml).update(
        NVMLError=FakeError, nvmlInit=init, nvmlShutdown=shut_down, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=about.gpus[handle]),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    return about


def test_the_driver_tells_what_is_free(driver: SimpleNamespace) -> None:
    assert _nvml.free_bytes(UUID) == 20 * GB
    assert driver.opened == 0


def test_a_slice_of_a_gpu_has_its_own_memory(driver: SimpleNamespace) -> None:
    driver.gpus = {f"MIG-{UUID}": 5 * GB}
    assert _nvml.free_bytes(UUID) == 5 * GB


def test_nobody_tells_without_the_library_a_driver_or_the_gpu(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _nvml.free_bytes("another") is None
    driver.failing = True
    assert _nvml.free_bytes(UUID) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert _nvml.free_bytes(UUID) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of one GPU; `contexts` counts what takes a context there."""
    import torch

    about = SimpleNamespace(contexts=0)
    properties = SimpleNamespace(
        name="Test", uuid=UUID, total_memory=24 * GB, major=8, minor=9, multi_processor_count=128
    )

    def mem_get_info(_: int) -> tuple[int, int]:
        about.contexts += 1
        return 19 * GB, 24 * GB

    for name, value in {
        "get_device_properties": lambda _: properties, "mem_get_info": mem_get_info,
        "memory_reserved": lambda _: 3 * GB, "memory_allocated": lambda _: 2 * GB, "get_arch_list": list,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return about


def test_no_context_is_taken_where_the_driver_tells(driver: SimpleNamespace, gpu: SimpleNamespace) -> None:
    """What torch's allocator holds unused counts as free in any case."""
    found = _torch._one(0)
    assert (found.free_bytes, found.total_bytes, gpu.contexts) == (21 * GB, 24 * GB, 0)


def test_torch_is_asked_where_the_driver_does_not(driver: SimpleNamespace, gpu: SimpleNamespace) -> None:
    driver.failing = True
    assert (_torch._one(0).free_bytes, gpu.contexts) == (20 * GB, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="what /dev shows is asked on Linux")
def test_without_a_driver_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from loadstone.hardware import _torch\n"
        f"print(_torch.cuda_facts(dev=pathlib.Path({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "no driver for a GPU is loaded False"


@pytest.mark.skipif(sys.platform != "linux", reason="what /dev shows is asked on Linux")
@pytest.mark.parametrize("name", ["nvidia0", "dxg", "kfd", "nvgpu"])
def test_with_any_drivers_device_torch_decides(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert _torch.cuda_facts(dev=tmp_path) != "no driver for a GPU is loaded"
