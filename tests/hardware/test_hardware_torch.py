"""What is asked of torch about accelerators, and what is made of the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loadstone.hardware import Unusable, _torch, cuda, memory_limits, mps, xpu
from loadstone.telemetry import Event, subscribe

GB = 10**9


def facts(index: int, *, has_kernels: bool = True, has_bfloat16: bool = True) -> _torch.CudaFacts:
    return _torch.CudaFacts(
        index=index,
        name="NVIDIA Test",
        total_bytes=24 * GB,
        free_bytes=20 * GB,
        compute_capability=(8, 9) if has_bfloat16 else (7, 5),
        processors=128,
        has_bfloat16=has_bfloat16,
        has_kernels=has_kernels,
    )


def test_cuda_device_says_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "cuda_facts", lambda: [facts(0), facts(1, has_bfloat16=False)])
    first, second = cuda.probe()
    assert (first.torch_name, first.free_bytes, first.capabilities) == (
        "cuda:0",
        20 * GB,
        {"sm_89", "float16", "bfloat16"},
    )
    assert "bfloat16" not in second.capabilities


def test_cuda_device_without_kernels_in_this_torch_is_passed_over_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_torch, "cuda_facts", lambda: [facts(0), facts(1, has_kernels=False)])
    events: list[Event] = []
    end = subscribe(events.append)
    try:
        found = cuda.probe()
    finally:
        end()
    assert [device.index for device in found] == [0]
    assert [event.name for event in events] == ["hardware.warning"]
    assert "cuda:1" in events[0].fields["reason"]


def test_only_devices_without_kernels_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "cuda_facts", lambda: [facts(0, has_kernels=False)])
    assert "no kernels for cuda:0" in str(cuda.probe())


@pytest.mark.parametrize(
    ("built_for", "capability", "expected"),
    [
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_80", "sm_90"], (6, 1), False),
        (["sm_86"], (8, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["gfx90a"], (9, 0), True),
        ([], (7, 0), True),
    ],
)
def test_kernels_run_on_the_same_major_version(
    built_for: list[str], capability: tuple[int, int], expected: bool
) -> None:
    assert _torch._has_kernels(built_for, capability) is expected


def test_this_torch_answers_about_accelerators() -> None:
    """Whatever this machine has, the answer is devices or a reason, never an exception."""
    for found in (cuda.probe(), mps.probe()):
        assert found
        assert isinstance(found, (str, list))


def test_mps_shares_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "mps_memory", lambda: (10**15, 0))
    (device,) = mps.probe()
    assert device.free_bytes < 10**15
    assert device.torch_name == "mps"
    assert device.largest_buffer_bytes == memory_limits().physical_bytes // 2


def test_mps_has_no_more_than_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what torch has there already."""
    monkeypatch.setattr(_torch, "mps_memory", lambda: (1000, 400))
    (device,) = mps.probe()
    assert (device.total_bytes, device.free_bytes) == (1000, 600)


def test_hardware_is_imported_and_the_processor_found_without_torch() -> None:
    code = (
        "import sys\n"
        "from loadstone.hardware import get_device_manager, memory_limits\n"
        "memory_limits(); get_device_manager().resolve('cpu')\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_driver_without_a_torch_for_it_is_a_device_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    found = _torch.cuda_facts(dev=tmp_path)
    if isinstance(found, list):
        pytest.skip("this machine has a CUDA device")
    assert isinstance(found, Unusable)


def test_a_machine_without_a_driver_has_nothing_that_could_be_used(tmp_path: Path) -> None:
    found = _torch.cuda_facts(dev=tmp_path)
    if isinstance(found, list):
        pytest.skip("this system tells no drivers by files")
    assert not isinstance(found, Unusable)


def test_intels_gpus_are_not_looked_for_by_a_torch_that_is_not_built_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "version", lambda _: "2.13.0+cpu")
    assert xpu.probe() == "this build of torch has no XPU support"


def test_an_xpu_says_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _torch.XpuFacts(1, "Intel Test", 16 * GB, 15 * GB, 512, ("float16", "bfloat16"))
    monkeypatch.setattr(_torch, "xpu_facts", lambda: [facts])
    (found,) = xpu.probe()
    assert (found.torch_name, found.free_bytes, found.cores) == ("xpu:1", 15 * GB, 512)
    assert "bfloat16" in found.capabilities
