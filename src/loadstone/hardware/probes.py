"""The probes by kind of device; plug-ins come in through the entry point group `loadstone.devices`.

A probe takes nothing and returns the devices of its kind, or the reason why there are none: `Unusable`, where there
is one and only something around it is not right. One that raises is passed over with the error as the reason: a broken
driver must not keep a model off the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points

from .device import Device, Unusable

Probe = Callable[[], "Sequence[Device] | str"]

_BUILT_IN = {
    "cuda": "loadstone.hardware.cuda:probe",
    "xpu": "loadstone.hardware.xpu:probe",
    "mps": "loadstone.hardware.mps:probe",
    "cpu": "loadstone.hardware.cpu:probe",
}
_registered: dict[str, Probe] = {}


def register_probe(kind: str, probe: Probe) -> None:
    """Make a kind of device known, or replace the probe of a known one."""
    _registered[kind] = probe


def known_probes() -> dict[str, Probe]:
    """Return the probes by kind, most wanted first: cuda, xpu, mps, plug-ins by name, and cpu last."""
    probes = {kind: _lazy(place) for kind, place in _BUILT_IN.items() if kind != "cpu"}
    for entry in sorted(entry_points(group="loadstone.devices"), key=lambda entry: entry.name):
        probes[entry.name] = _lazy(entry.value)
    probes.update(_registered)
    cpu = probes.pop("cpu", None) or _lazy(_BUILT_IN["cpu"])
    return {**probes, "cpu": cpu}


def run_probes(probes: Mapping[str, Probe]) -> tuple[tuple[Device, ...], dict[str, str]]:
    """Return the devices that the probes find, in their order, and the reasons of the kinds without any."""
    devices: list[Device] = []
    absent: dict[str, str] = {}
    for kind, probe in probes.items():
        try:
            found = probe()
        except Exception as error:  # noqa: BLE001 - whatever a driver or a plug-in raises is a reason, not an end
            found = Unusable(f"its probe failed: {type(error).__name__}: {error}")
        if isinstance(found, str):
            absent[kind] = found
        elif not found:
            absent[kind] = "none was found"
        else:
            devices.extend(found)
    return tuple(devices), absent


def _lazy(place: str) -> Probe:
    """Return a probe that is imported from "module:attribute" when it is called."""

    def probe() -> Sequence[Device] | str:
        module, _, attribute = place.partition(":")
        found: Sequence[Device] | str = getattr(import_module(module), attribute)()
        return found

    return probe
