"""The devices that Loadstone ships for other people's tests."""

from __future__ import annotations

import pytest

from loadstone import ModelManager
from loadstone.errors import ConfigurationError, ResourceError
from loadstone.telemetry import Event
from loadstone.testing import fake_device, fake_devices


def managed(devices: object, **wish: object) -> ModelManager:
    """Return the manager of the bundled model on a machine with these devices."""
    return ModelManager({"model_config": {"base_model": "smollm2", **wish}}, devices=devices)  # type: ignore[arg-type]


def test_a_fake_device_is_chosen_and_planned_for() -> None:
    plan = managed(fake_devices("cuda", memory="24GB")).plan()
    assert (plan.device.torch_name, plan.settings.compute_dtype) == ("cuda:0", "bfloat16")


def test_a_machine_without_named_devices_is_a_processor() -> None:
    assert fake_devices().detect_optimal_device().torch_name == "cpu"


def test_what_does_not_fit_on_a_fake_device_is_refused() -> None:
    with pytest.raises(ResourceError):
        managed(fake_devices(fake_device("cuda", memory="24GB", free="50MB"))).plan()


def test_falling_back_from_a_device_that_cannot_be_used_is_said(events: list[Event]) -> None:
    devices = fake_devices(unusable={"cuda": "its driver is too old; update it"})
    assert managed(devices).get_device().kind == "cpu"
    warned = [event.fields["reason"] for event in events if event.name == "hardware.warning"]
    assert warned == ["cpu takes the place of cuda: its driver is too old; update it"]


def test_nothing_is_said_of_a_device_that_nobody_has(events: list[Event]) -> None:
    managed(fake_devices()).get_device()
    assert not [event for event in events if event.name == "hardware.warning"]


def test_a_required_kind_is_taken_before_a_better_one() -> None:
    assert managed(fake_devices("cuda", "cpu"), require="cpu").get_device().kind == "cpu"


def test_a_required_kind_that_is_not_there_is_refused_with_the_reason() -> None:
    devices = fake_devices(unusable={"cuda": "its driver is too old"})
    with pytest.raises(ConfigurationError, match="its driver is too old"):
        managed(devices, require="cuda").load_base_model()


def test_a_required_kind_and_a_device_of_another_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="'mps' is asked for, and 'cuda' is required") as caught:
        managed(fake_devices("cuda", "mps"), device="mps", require="cuda").get_device()
    assert caught.value.key == "model_config.require"


def test_several_devices_of_a_kind_are_told_apart_by_index() -> None:
    small, large = fake_device("cuda", 0, free="8GB"), fake_device("cuda", 1, free="20GB")
    assert fake_devices(small, large).detect_optimal_device().index == 1


@pytest.mark.parametrize("value", ["auto", "cuda:1", "two words", ""])
def test_require_names_a_kind(value: str) -> None:
    with pytest.raises(ConfigurationError, match="not a kind of device"):
        managed(fake_devices(), require=value)
