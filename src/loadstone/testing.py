"""Devices that are not there, for the tests of who builds on Loadstone: what would be chosen, planned and refused.

    manager = ModelManager({...}, devices=fake_devices("cuda", memory="24GB"))
    assert manager.plan().device.kind == "cuda"

Such a device can be chosen and planned for; a load to it fails as it would on a machine whose driver is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .hardware import Device, DeviceManager, Unusable
from .units import parse_size

_CAPABILITIES = {
    "cuda": {"sm_90", "float16", "bfloat16"},
    "xpu": {"float16", "bfloat16"},
    "mps": {"float16"},
    "cpu": {"avx2", "fma"},
}


def fake_device(
    kind: str, index: int | None = None, *, memory: str | int = "24GB", free: str | int | None = None, cores: int = 8,
    capabilities: Iterable[str] | None = None,
) -> Device:  # fmt: skip
    """Return a device of `kind` with so much memory, all of it free where `free` does not say otherwise.

    Without `capabilities` it has those of a usual one of its kind: a GPU multiplies in bfloat16, but not a Mac's.
    """
    total = parse_size(memory)
    place = None if kind == "cpu" else index or 0
    found = _CAPABILITIES.get(kind, set()) if capabilities is None else capabilities
    left = total if free is None else parse_size(free)
    return Device(kind, place, f"fake {kind}", total, left, cores=cores, capabilities=frozenset(found))


def fake_devices(
    *devices: Device | str, memory: str | int = "24GB", unusable: dict[str, str] | None = None
) -> DeviceManager:
    """Return the manager of a machine that has these devices and no others; give it as `ModelManager(devices=…)`.

    A device that is only named, such as "cuda", has `memory`. Every machine has a processor: one with 8 cores and
    32 GB where none is given. `unusable` names kinds that are there and cannot be used, each with the reason.
    """
    made = [one if isinstance(one, Device) else fake_device(one, memory=memory) for one in devices]
    if all(one.kind != "cpu" for one in made):
        made.append(fake_device("cpu", memory="32GB"))

    def probe_of(kind: str) -> list[Device] | str:
        mine = [one for one in made if one.kind == kind]
        if mine:
            return mine
        reason = (unusable or {}).get(kind)
        return "this fake machine has none" if reason is None else Unusable(reason)

    order = ("cuda", "xpu", "mps")
    others = [one.kind for one in made if one.kind not in (*order, "cpu")]
    kinds = dict.fromkeys([*order, *others, "cpu"])
    return DeviceManager({kind: lambda kind=kind: probe_of(kind) for kind in kinds})  # type: ignore[misc]
