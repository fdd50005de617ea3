"""Speeds of this machine: measured once, remembered, measured anew; and never believed where they cannot be."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from loadstone.hardware import Device, speeds
from loadstone.hardware.speeds import GOOD_FOR, machine_speeds

CPU = Device("cpu", None, "Test CPU", 1, 1, cores=2, capabilities=frozenset({"avx2"}))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An empty cache folder, and a count of measurements, which tell made-up figures."""
    seen: list[int] = []

    def measure(cores: int) -> dict[str, float]:
        seen.append(cores)
        return {"memory": 3e10, "products": 2e11}

    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path))
    monkeypatch.setattr(speeds, "measure", measure)
    monkeypatch.setattr(speeds, "_is_busy", lambda: False)
    return seen


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "speeds.json"


def change(tmp_path: Path, **figures: object) -> None:
    content = json.loads(file_of(tmp_path).read_text())
    for one in content.values():
        one.update(figures)
    file_of(tmp_path).write_text(json.dumps(content))


def test_figures_are_measured_once_and_said_to_be_so(measured: list[int]) -> None:
    first, second = machine_speeds(CPU), machine_speeds(CPU)
    assert measured == [2]
    assert first.memory is not None
    assert (first.memory.value, first.memory.source) == (3e10, "measured here just now")
    assert first.memory.is_measured
    assert not first.memory.is_peak
    assert second.products is not None
    assert second.products.value == 2e11


def test_another_processor_is_another_machine(measured: list[int]) -> None:
    for device in (CPU, Device("cpu", None, "Test CPU", 1, 1, cores=4), CPU):
        machine_speeds(device)
    assert measured == [2, 4]


@pytest.mark.parametrize(
    "figures",
    [{"measured": time.time() - GOOD_FOR - 9}, {"measured": time.time() + 9999}, {"memory": -1}, {"memory": "x"}],
)
def test_what_is_old_or_cannot_be_is_measured_anew(
    measured: list[int], tmp_path: Path, figures: dict[str, object]
) -> None:
    machine_speeds(CPU)
    change(tmp_path, **figures)
    machine_speeds(CPU)
    assert measured == [2, 2]


def test_what_was_measured_while_others_worked_is_said_so_and_measured_anew_after_an_hour(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speeds, "_is_busy", lambda: True)
    found = machine_speeds(CPU)
    assert found.memory is not None
    assert found.memory.source == "measured here just now, while other programs worked"
    machine_speeds(CPU)
    assert measured == [2]
    change(tmp_path, measured=time.time() - 4000)
    machine_speeds(CPU)
    assert measured == [2, 2]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1}'])
def test_a_damaged_file_is_as_good_as_none(measured: list[int], tmp_path: Path, content: bytes) -> None:
    machine_speeds(CPU)
    file_of(tmp_path).write_bytes(content)
    assert machine_speeds(CPU).memory is not None
    assert measured == [2, 2]


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path / "file"))
    assert machine_speeds(CPU).memory is not None


def test_of_a_gpu_nothing_is_measured(measured: list[int]) -> None:
    assert machine_speeds(Device("cuda", 0, "GPU", 1, 1)) == speeds.Speeds()
    assert not measured


def test_this_machine_has_speeds_that_can_be() -> None:
    found = speeds.measure(2)
    assert 1e9 < found["memory"] < 1e13
    assert 1e9 < found["products"] < 1e14


def test_a_disk_is_measured_on_a_file_of_it_and_remembered(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(4096) * 8192)
    found = machine_speeds(CPU, file)
    if found.disk is None:
        pytest.skip("this file system has no direct reads")
    assert 1e6 < found.disk.value < 1e12
    monkeypatch.setattr(speeds, "measure_disk", lambda _: pytest.fail("measured again"))
    assert machine_speeds(CPU, file).disk == found.disk


@pytest.mark.parametrize("size", [0, 5000])
def test_a_small_file_says_nothing_of_its_disk(measured: list[int], tmp_path: Path, size: int) -> None:
    file = tmp_path / "small"
    file.write_bytes(bytes(size))
    assert machine_speeds(CPU, file).disk is None
    assert machine_speeds(CPU, tmp_path / "nowhere").disk is None
