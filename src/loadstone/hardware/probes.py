"""The probes by kind of device; plug-ins come in through the entry point group `loadstone.devices`.

A probe takes nothing and returns the devices of its kind, or the reason why there are none: `Unusable`, where there
is one and only something around it is not right. One that raises is passed over with the error as the reason: a broken
driver must not keep a model off the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from loadstone.errors import ConfigurationError
from loadstone.plugins import Door

from .device import Device, Unusable

Probe = Callable[[], "Sequence[Device] | str"]


def _probe(name: str, found: Any) -> Probe:
    if not callable(found):
        raise TypeError(f"{found!r} is no function that looks for devices")
    return cast("Probe", found)


DEVICES: Door[Probe] = Door(
    "loadstone.devices",
    {
        "cuda": "loadstone.hardware.cuda:probe",
        "xpu": "loadstone.hardware.xpu:probe",
        "mps": "loadstone.hardware.mps:probe",
        "cpu": "loadstone.hardware.cpu:probe",
    },
    _probe,
)


def register_probe(kind: str, probe: Probe) -> None:
    """Make a kind of device known, or replace the probe of a known one."""
    DEVICES.register(kind, probe)


def known_probes() -> dict[str, Probe]:
    """Return the probes by kind, most wanted first: cuda, xpu, mps, plug-ins by name, and cpu last."""
    kinds = (*DEVICES.names(), *DEVICES.problems)
    return {kind: _lazy(kind) for kind in sorted(kinds, key=lambda kind: kind == "cpu")}


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


def _lazy(kind: str) -> Probe:
    """Return a probe that is imported when it is called; of a plug-in that cannot be used, one that says so."""

    def probe() -> Sequence[Device] | str:
        try:
            found = DEVICES.find(kind)
        except ConfigurationError as error:
            return error.message
        return found() if found is not None else "it is not known any more"

    return probe
