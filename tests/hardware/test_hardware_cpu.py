"""What the processor is and how much of it this process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from loadstone.hardware import cpu

INTEL = "\n\n".join(
    f"processor\t: {number}\nmodel name\t: Intel(R) Xeon(R) Platinum 8488C\nphysical id\t: 0\n"
    f"core id\t\t: {number // 2}\nflags\t\t: fpu sse2 avx avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile"
    for number in range(2)
)
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimddp i8mm bf16\n"


def proc(root: Path, cpuinfo: str, cgroup: str = "") -> Path:
    """Make a /proc with this cpuinfo and these control groups."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    (root / "proc" / "self" / "cgroup").write_text(cgroup, encoding="utf-8")
    return root / "proc"


def test_name_and_capabilities_of_an_intel_processor(tmp_path: Path) -> None:
    root = proc(tmp_path, INTEL)
    assert cpu.processor_name(proc_root=root) == "Intel(R) Xeon(R) Platinum 8488C"
    assert cpu.capabilities(proc_root=root) == {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"}


def test_capabilities_of_an_arm_processor(tmp_path: Path) -> None:
    found = cpu.capabilities(proc_root=proc(tmp_path, ARM))
    assert found == {"neon", "dotprod", "i8mm", "arm_bf16"}


def test_capabilities_of_a_mac() -> None:
    values = {"hw.optional.neon": "1", "hw.optional.arm.FEAT_BF16": "1", "hw.optional.avx2_0": "0"}
    assert cpu.mac_capabilities(lambda name: values.get(name, "")) == {"neon", "arm_bf16"}


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_two_threads_of_one_core_count_once(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))[:2]
    blocks = [f"processor\t: {number}\nphysical id\t: 0\ncore id\t\t: 0" for number in allowed]
    root = proc(tmp_path, "\n\n".join(blocks))
    assert cpu.usable_cores(proc_root=root, cgroup_root=tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/box", "box", {"cpu.max": "150000 100000"}),
        (
            "1:cpu,cpuacct:/box",
            "cpu,cpuacct/box",
            {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"},
        ),
        ("1:cpu:/box", "cpu/box", {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}),
    ],
)
def test_processor_time_of_a_container_bounds_the_cores(
    tmp_path: Path, line: str, folder: str, files: dict[str, str]
) -> None:
    groups = tmp_path / "cgroup"
    (groups / folder).mkdir(parents=True)
    for name, content in files.items():
        (groups / folder / name).write_text(content, encoding="utf-8")
    assert cpu.usable_cores(proc_root=proc(tmp_path, "", line), cgroup_root=groups) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize("content", ["max 100000", "-1 100000", "nonsense"])
def test_no_quota_leaves_all_cores(tmp_path: Path, content: str) -> None:
    groups = tmp_path / "cgroup"
    groups.mkdir()
    root = proc(tmp_path, "", "0::/")
    without = cpu.usable_cores(proc_root=root, cgroup_root=groups)
    (groups / "cpu.max").write_text(content, encoding="utf-8")
    assert cpu.usable_cores(proc_root=root, cgroup_root=groups) == without


def test_the_probe_finds_this_processor() -> None:
    (device,) = cpu.probe()
    assert (device.kind, device.index, device.torch_name) == ("cpu", None, "cpu")
    assert device.name
    assert 1 <= device.cores <= (os.cpu_count() or 1)
    assert 0 < device.free_bytes <= device.total_bytes
