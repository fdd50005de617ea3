"""Machines that one does not have: by name, described in words, and what is assumed of them."""

from __future__ import annotations

import pytest

from loadstone import ConfigurationError
from loadstone.planner import find_machine, known_machines

GB, GIB = 10**9, 2**30


@pytest.mark.parametrize("name", known_machines())
def test_every_machine_has_figures_that_can_be_and_says_where_they_are_from(name: str) -> None:
    machine = find_machine(name)
    device = machine.device
    assert machine.source.startswith("https://")
    assert 0 < device.free_bytes <= device.total_bytes
    assert 4 * GB < device.total_bytes < 250 * GB
    assert machine.speeds.memory is not None
    assert 40 * GB <= machine.speeds.memory.value < 10_000 * GB
    assert machine.speeds.memory.is_peak
    assert not machine.speeds.memory.is_measured
    assert machine.assumed


@pytest.mark.parametrize("name", [name for name in known_machines() if name.rpartition("-")[2].endswith("gb")])
def test_a_name_says_the_memory_that_the_machine_has(name: str) -> None:
    said = int(name.rpartition("-")[2].removesuffix("gb"))
    told = find_machine(name)
    whole = told.device.total_bytes if told.device.kind != "mps" else said * GIB
    assert whole in (said * GB, said * GIB)


@pytest.mark.parametrize(
    ("name", "kind", "memory", "rate"),
    [
        ("rtx-3060-12gb", "cuda", 12 * GIB, 360),
        ("h200-141gb", "cuda", 141 * GB, 4800),
        ("m2-16gb", "mps", round(16 * GIB * 2 / 3), 100),
        ("laptop-16gb", "cpu", 16 * GIB, 51.2),
        (" RTX-4090-24GB ", "cuda", 24 * GIB, 1008),
    ],
)
def test_names_lead_to_kind_memory_and_rate(name: str, kind: str, memory: int, rate: float) -> None:
    machine = find_machine(name)
    assert machine.speeds.memory is not None
    assert (machine.device.kind, machine.device.total_bytes) == (kind, memory)
    assert machine.speeds.memory.value == pytest.approx(rate * GB)


def test_cards_without_bfloat16_are_known() -> None:
    assert "bfloat16" not in find_machine("t4-16gb").device.capabilities
    assert "bfloat16" in find_machine("l4-24gb").device.capabilities


def test_what_the_system_keeps_is_told() -> None:
    laptop = find_machine("laptop-8gb")
    assert laptop.device.total_bytes - laptop.device.free_bytes == 8 * GIB // 4
    assert any("keep 2.15 GB of 8.59 GB" in one for one in laptop.assumed)


def test_a_processor_can_be_described() -> None:
    machine = find_machine("cpus=8, ram=32GB, bandwidth=40GB/s, disk=2GB/s, tflops=0.5, features=avx2+fma+avx512_vnni")
    device, speeds = machine.device, machine.speeds
    assert (device.kind, device.cores, device.total_bytes) == ("cpu", 8, 32 * GB)
    assert device.capabilities == {"avx2", "fma", "avx512_vnni"}
    assert [one and one.value for one in (speeds.memory, speeds.products, speeds.disk)] == [40e9, 5e11, 2e9]
    assert speeds.memory is not None
    assert not speeds.memory.is_peak


def test_a_gpu_can_be_described_and_what_is_not_said_is_not_known() -> None:
    machine = find_machine("vram=12GB,bandwidth=360GB/s")
    assert (machine.device.kind, machine.device.total_bytes) == ("cuda", 12 * GB)
    assert (machine.speeds.products, machine.speeds.disk) == (None, None)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("rtx-3060-8gb", "rtx-3060-12gb"),
        ("RTX 4090", "rtx-4090-24gb"),
        ("toaster", "Known are rtx-3060-12gb"),
        ("cpu=4,ram=16GB", "Did you mean cpus"),
        ("cpus=4", "ram=16GB"),
        ("cpus=4,cpus=8,ram=16GB", "said twice"),
        ("ram=16", "not a size"),
        ("ram=16GB,bandwidth=40", "not a size"),
        ("ram=16GB,bandwidth=40GB/h", "not a rate"),
        ("ram=16GB,cpus=none", "not a number of cores"),
        ("ram=16GB,tflops=-1", "not a number"),
        ("vram=12GB,ram=16GB", "a GPU's and ram a processor's"),
        ("=", "not understood"),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_what_is(wish: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="machine") as caught:
        find_machine(wish)
    assert says in str(caught.value)
