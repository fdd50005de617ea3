"""What bounds this process's memory, read from trees of control groups as the kernel lays them out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadstone.hardware import memory_limits, peak_rss, process_rss
from loadstone.hardware.limits import MemoryLimits

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """A fake /proc and /sys/fs/cgroup in real folders."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.groups = root / "cgroup"
        self.groups.mkdir(parents=True)

    def process(self, cgroup: str, mountinfo: str = "") -> None:
        """Write what /proc/self says of the process's groups."""
        self.write(self.proc / "self" / "cgroup", cgroup)
        self.write(self.proc / "self" / "mountinfo", mountinfo)

    def group(self, path: str, **files: object) -> None:
        """Make a group with these files; two underscores stand for a dot."""
        for name, content in files.items():
            self.write(self.groups / path / name.replace("__", "."), str(content))

    def limits(self) -> MemoryLimits:
        """Return what is read from this machine."""
        return memory_limits(proc_root=self.proc, cgroup_root=self.groups)

    @staticmethod
    def write(file: Path, text: str) -> None:
        """Write a file as the kernel shows it, its folder made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_the_machine_alone_limits(machine: Machine) -> None:
    found = machine.limits()
    assert found.cgroups == ()
    assert found.limit_bytes == found.physical_bytes == psutil.virtual_memory().total
    assert found.free_bytes == found.available_bytes
    assert found.binding is None


def test_version_2_limit_of_a_parent_counts(machine: Machine) -> None:
    machine.process("0::/pod/container/app")
    machine.group("pod", memory__max=2 * GIB // 8, memory__current=GIB // 8)
    machine.group("pod/container", memory__max=GIB, memory__current=GIB // 16)
    machine.group("pod/container/app", memory__max="max", memory__current=GIB // 16)
    found = machine.limits()
    assert found.limit_bytes == 2 * GIB // 8
    assert found.free_bytes == GIB // 8
    assert [Path(group.path).name for group in found.cgroups] == ["container", "pod"]
    assert found.binding is not None
    assert Path(found.binding.path).name == "pod"


def test_the_group_that_leaves_least_is_not_always_the_smallest(machine: Machine) -> None:
    machine.process("0::/shared/own")
    machine.group("shared", memory__max=GIB // 2, memory__current=GIB // 2 - 1000)
    machine.group("shared/own", memory__max=GIB // 4, memory__current=0)
    found = machine.limits()
    assert (found.limit_bytes, found.free_bytes) == (GIB // 4, 1000)


def test_file_cache_counts_as_free(machine: Machine) -> None:
    machine.process("0::/")
    stat = "anon 1000\nactive_file 3000\ninactive_file 20000"
    machine.group("", memory__max=100_000, memory__current=24_000, memory__stat=stat)
    assert machine.limits().free_bytes == 99_000


def test_memory_high_is_a_limit_since_the_kernel_stalls_above_it(machine: Machine) -> None:
    machine.process("0::/")
    machine.group("", memory__max=GIB, memory__high=GIB // 2, memory__current=0)
    assert machine.limits().limit_bytes == GIB // 2


def test_use_above_the_limit_leaves_nothing_rather_than_less(machine: Machine) -> None:
    machine.process("0::/")
    machine.group("", memory__max=1000, memory__current=5000)
    assert machine.limits().free_bytes == 0


def test_version_1_limit_and_cache_are_read(machine: Machine) -> None:
    machine.process("5:cpuset:/x\n4:memory:/docker/abc\n0::/")
    stat = "cache 700\ntotal_inactive_file 400\ntotal_active_file 100"
    machine.group(
        "memory/docker/abc",
        memory__limit_in_bytes=10_000,
        memory__usage_in_bytes=2_000,
        memory__stat=stat,
    )
    machine.group("memory", memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=9_000_000)
    found = machine.limits()
    assert (found.limit_bytes, found.free_bytes, len(found.cgroups)) == (10_000, 8_500, 1)


def test_version_1_largest_number_means_no_limit(machine: Machine) -> None:
    machine.process("4:memory:/a")
    machine.group("memory/a", memory__limit_in_bytes=NO_LIMIT_V1, memory__usage_in_bytes=5)
    found = machine.limits()
    assert found.cgroups == ()
    assert found.limit_bytes == found.physical_bytes


def test_version_1_limit_of_an_unseen_parent_counts(machine: Machine) -> None:
    machine.process("4:memory:/a")
    machine.group(
        "memory/a",
        memory__limit_in_bytes=NO_LIMIT_V1,
        memory__usage_in_bytes=5,
        memory__stat="hierarchical_memory_limit 4096",
    )
    assert machine.limits().limit_bytes == 4096


def test_container_that_is_told_its_path_on_the_host_finds_its_own_group(machine: Machine) -> None:
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory"
    machine.process("4:memory:/docker/abc/inner", mount)
    machine.group("memory", memory__limit_in_bytes=9_000, memory__usage_in_bytes=0)
    machine.group("memory/inner", memory__limit_in_bytes=3_000, memory__usage_in_bytes=0)
    assert [group.limit_bytes for group in machine.limits().cgroups] == [3_000, 9_000]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/mounted/here", "/with:colon"])
def test_path_that_cannot_be_seen_falls_back_to_what_can(machine: Machine, path: str) -> None:
    machine.process(f"0::{path}")
    machine.group("", memory__max=7_000, memory__current=0)
    assert machine.limits().limit_bytes == 7_000


def test_path_never_leads_out_of_the_tree(machine: Machine) -> None:
    machine.process("0::/../outside")
    machine.write(machine.groups.parent / "outside" / "memory.max", "1")
    assert machine.limits().cgroups == ()


@pytest.mark.parametrize("content", ["", "no number", "-1"])
def test_unreadable_limit_is_no_limit(machine: Machine, content: str) -> None:
    machine.process("0::/")
    machine.group("", memory__max=content)
    assert machine.limits().cgroups == ()


def test_this_machine_can_be_read() -> None:
    found = memory_limits()
    assert 0 < found.free_bytes <= found.physical_bytes
    assert found.limit_bytes <= found.physical_bytes


def test_peak_is_at_least_what_is_held() -> None:
    held = process_rss()
    assert 0 < held <= peak_rss() + 2**20


def test_peak_is_the_process_own_and_not_its_parents() -> None:
    """A process started by a larger one must not report that one's peak."""
    ballast = bytearray(200 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from loadstone.hardware.limits import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < peak_rss() - 50 * 2**20
    assert len(ballast) > 0


def test_peak_falls_back_when_the_kernel_does_not_tell(tmp_path: Path) -> None:
    assert peak_rss(proc_root=tmp_path) >= process_rss() // 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing holds a process to it")
def test_limit_of_the_process_itself_counts() -> None:
    """What `ulimit -d` leaves is what can still be had."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (800_000_000, 800_000_000))\n"
        "from loadstone.hardware import memory_limits\n"
        "found = memory_limits(); print(found.limit_bytes, found.free_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit, free = map(int, done.stdout.split())
    assert limit == 800_000_000
    assert 0 < free < limit
