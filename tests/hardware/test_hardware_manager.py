"""Which device is chosen, why, and what is said when the one asked for is not there."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from loadstone import plugins
from loadstone.errors import ConfigurationError
from loadstone.hardware import Device, DeviceManager, get_device_manager, probes, register_probe
from loadstone.telemetry import Event

GB = 10**9
CPU = Device("cpu", None, "Test CPU", 32 * GB, 28 * GB, cores=8, capabilities=frozenset({"avx2", "fma"}))
SMALL = Device("cuda", 0, "Small GPU", 8 * GB, 6 * GB, capabilities=frozenset({"float16"}))
LARGE = Device("cuda", 1, "Large GPU", 24 * GB, 22 * GB, capabilities=frozenset({"float16", "bfloat16"}))
APPLE = Device("mps", 0, "Apple GPU", 24 * GB, 12 * GB)


def machine(*, cuda: object = "no driver", mps: object = "not a Mac") -> DeviceManager:
    """Return the manager of a machine that has these devices, or lacks them for these reasons."""
    return DeviceManager({"cuda": lambda: cuda, "mps": lambda: mps, "cpu": lambda: [CPU]})


def model(**changes: object) -> SimpleNamespace:
    """Return the sizes of Qwen2.5-7B, changed."""
    sizes = {
        "name": "test",
        "hidden_size": 3584,
        "head_size": 128,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tied_embeddings": False,
        "parameters": 7_615_616_512,
    }
    return SimpleNamespace(**{**sizes, **changes})


def test_cuda_device_with_most_free_memory_is_chosen() -> None:
    best = machine(cuda=[SMALL, LARGE]).detect_optimal_device()
    assert best.torch_name == "cuda:1"
    assert "most free memory" in best.reason


def test_each_device_passed_over_has_its_reason() -> None:
    passed = machine(cuda=[SMALL, LARGE]).detect_optimal_device().passed_over
    assert passed == (
        "mps: not a Mac",
        "cuda:0: less free memory (6 GB) than cuda:1",
        "cpu: cuda:1 is faster",
    )


def test_mps_comes_before_the_processor() -> None:
    assert machine(mps=[APPLE]).detect_optimal_device().kind == "mps"


def test_processor_is_chosen_when_nothing_else_is_there() -> None:
    best = machine().detect_optimal_device()
    assert (best.kind, best.reason) == ("cpu", "no accelerator can be used")
    assert best.passed_over == ("cuda: no driver", "mps: not a Mac")


def test_probe_that_raises_is_passed_over_with_an_event(events: list[Event]) -> None:
    def broken() -> list[Device]:
        raise OSError("driver mismatch")

    best = DeviceManager({"cuda": broken, "cpu": lambda: [CPU]}).detect_optimal_device()
    assert best.passed_over == ("cuda: its probe failed: OSError: driver mismatch",)
    assert [(event.name, event.fields["kind"]) for event in events] == [("hardware.warning", "cuda")]


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ("auto", "cuda:1"),
        ("cpu", "cpu"),
        ("cuda", "cuda:1"),
        ("cuda:0", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("mps", "mps"),
        ("mps:0", "mps"),
        (" CUDA:0 ", "cuda:0"),
    ],
)
def test_wish_is_resolved_to_the_device_it_names(wish: str, name: str) -> None:
    assert machine(cuda=[SMALL, LARGE], mps=[APPLE]).resolve(wish).torch_name == name


def test_absent_device_is_refused_with_the_reason_and_what_there_is() -> None:
    with pytest.raises(ConfigurationError) as caught:
        machine().resolve("cuda")
    assert "no driver" in str(caught.value)
    assert "cpu (Test CPU)" in str(caught.value)
    assert caught.value.key == "model_config.device"


def test_absent_index_is_refused_with_the_indices_there_are() -> None:
    with pytest.raises(ConfigurationError, match="there is cuda:1, cuda:0"):
        machine(cuda=[SMALL, LARGE]).resolve("cuda:7")


@pytest.mark.parametrize(("wish", "near"), [("cudda", "cuda"), ("atuo", "auto"), ("mpss:0", "mps")])
def test_unknown_device_names_the_nearest(wish: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Did you mean '{near}'"):
        machine().resolve(wish)


@pytest.mark.parametrize("wish", ["", "cuda:", "cuda:x", "cuda:-1", "1"])
def test_malformed_device_is_refused(wish: str) -> None:
    with pytest.raises(ConfigurationError, match="known are auto, cuda, mps, cpu"):
        machine().resolve(wish)


def test_asking_for_one_kind_does_not_probe_another() -> None:
    def unasked() -> list[Device]:
        raise AssertionError("probed")

    assert DeviceManager({"cuda": unasked, "cpu": lambda: [CPU]}).resolve("cpu").kind == "cpu"


def test_new_kind_of_device_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.DEVICES, "_things", {})
    register_probe("toy", lambda: [Device("toy", 0, "Toy", GB, GB)])
    assert DeviceManager().resolve("toy:0").name == "Toy"
    assert list(probes.known_probes()) == ["cuda", "xpu", "mps", "toy", "cpu"]


def test_broken_plug_in_keeps_nobody_from_the_processor(monkeypatch: pytest.MonkeyPatch, events: list[Event]) -> None:
    """It is reported once, and stays among what is absent with its reason."""
    plug_in = EntryPoint("npu", "no_such_module:probe", "loadstone.devices")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [plug_in])
    monkeypatch.setattr(probes.DEVICES, "_problems", {})
    monkeypatch.setattr(probes.DEVICES, "_things", {"cuda": lambda: "none here", "mps": lambda: "none here"})
    manager = DeviceManager()
    for _ in range(2):
        assert manager.detect_optimal_device().kind == "cpu"
        assert "ModuleNotFoundError" in manager.absent()["npu"]
    assert [event.name for event in events] == ["plugin.warning"]


def test_a_plug_in_whose_probe_raises_keeps_nobody_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    monkeypatch.setattr(probes.DEVICES, "_things", {"cuda": lambda: 1 / 0, "mps": lambda: "none here"})
    assert DeviceManager().detect_optimal_device().kind == "cpu"
    assert "ZeroDivisionError" in DeviceManager().absent()["cuda"]
    assert {event.name for event in events} == {"hardware.warning"}


def test_one_manager_a_process() -> None:
    assert get_device_manager() is get_device_manager()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (CPU, ("float32", "float16", 64, 8)),
        (Device("cpu", None, "x", 1, 1, 4, frozenset({"avx512_bf16"})), ("float32", "float16", 64, 4)),
        (LARGE, ("bfloat16", "bfloat16", 2048, 0)),
        (SMALL, ("float16", "float16", 2048, 0)),
        (APPLE, ("float16", "float16", 512, 0)),
    ],
)
def test_device_is_used_as_it_is_best(device: Device, expected: tuple[str, str, int, int]) -> None:
    found = machine().optimize_memory_settings(device)
    assert (found.compute_dtype, found.cache_dtype, found.prefill_chunk, found.threads) == expected
    assert found.reasons[0].startswith(expected[0])


def test_good_device_is_compatible() -> None:
    report = machine().validate_device_compatibility(model(), CPU)
    assert report.ok
    assert {check.name for check in report.checks} >= {
        "memory",
        "kernels",
        "compute type",
        "driver",
        "head size",
    }


def test_compatibility_is_of_the_best_device_unless_told() -> None:
    assert machine(mps=[APPLE]).validate_device_compatibility(model()).device.kind == "mps"


@pytest.mark.parametrize(
    ("device", "changes", "name", "ok"),
    [
        (Device("cpu", None, "x", 4 * GB, 4 * GB, 2, frozenset({"avx2"})), {}, "memory", False),
        (CPU, {"head_size": 127}, "head size", False),
        (CPU, {"hidden_size": 1000}, "4-bit blocks", True),
        (Device("cpu", None, "old", 32 * GB, 28 * GB, 2), {}, "fast product", True),
        (Device("cuda", 0, "old", 24 * GB, 20 * GB), {}, "compute type", True),
    ],
)
def test_what_is_not_well_has_a_remedy(device: Device, changes: dict[str, object], name: str, ok: bool) -> None:
    """`ok` tells whether the model can run all the same."""
    report = machine().validate_device_compatibility(model(**changes), device)
    bad = [check for check in report.checks if not check.ok]
    assert [check.name for check in bad] == [name]
    assert bad[0].remedy
    assert report.ok is ok
