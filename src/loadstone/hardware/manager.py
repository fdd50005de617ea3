"""DeviceManager: which devices there are, which one is meant, and how it is best used.

Devices are looked at anew on each call, since what is free changes; nothing is kept between calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache

from loadstone.errors import ConfigurationError
from loadstone.telemetry import emit
from loadstone.units import format_size

from .compatibility import ModelShape, best_settings, check_compatibility
from .device import CompatibilityReport, Device, MemorySettings, Unusable
from .probes import Probe, known_probes, run_probes

_WISH = re.compile(r"([a-z][a-z0-9_]*)(?::([0-9]+))?")


class DeviceManager:
    """Finds, chooses and judges the devices of this machine.

    `probes` replaces the known probes, most wanted kind first; it is how a test gives a machine its
    devices. Safe to use from several threads.
    """

    def __init__(self, probes: Mapping[str, Probe] | None = None) -> None:
        self._given = None if probes is None else dict(probes)

    def devices(self) -> tuple[Device, ...]:
        """Return the devices of this machine, most wanted first."""
        return self._ranked(self._probes())[0]

    def absent(self) -> Mapping[str, str]:
        """Return the kinds of which this machine has no device, each with the reason."""
        return run_probes(self._probes())[1]

    def detect_optimal_device(self) -> Device:
        """Return the device that serves best, with the reason, and for each other one why it was passed over.

        A CUDA device comes first, the one with most free memory; then XPU, MPS, plug-ins, and the processor. Where a
        better one is there and cannot be used, the event `hardware.warning` says so.
        """
        ranked, absent = self._ranked(self._probes())
        if not ranked:
            raise ConfigurationError(f"No device was found: {_sentence(absent)}", key="model_config.device")
        best, others = ranked[0], ranked[1:]
        for kind, reason in absent.items():
            if isinstance(reason, Unusable):
                emit("hardware.warning", kind=kind, reason=f"{best.torch_name} takes the place of {kind}: {reason}")
        passed = [f"{kind}: {reason}" for kind, reason in absent.items()]
        passed += [f"{other.torch_name}: {_why_not(other, best)}" for other in others]
        return replace(best, reason=_why(best, others), passed_over=tuple(passed))

    def resolve(self, wish: str, *, require: str | None = None) -> Device:
        """Return the device that `wish` names: "auto", or a kind, also with an index ("cuda:1").

        `require` is the only kind that it may be of. Raises ConfigurationError when a name means nothing, the two
        contradict each other, or the device is not there, saying what is.
        """
        text, kind_required = wish.strip().lower(), (require or "").strip().lower()
        if text == "auto" and kind_required:
            text = wish = kind_required
        if kind_required and text.partition(":")[0] != kind_required:
            raise ConfigurationError(
                f"device {wish!r} is asked for, and {require!r} is required",
                key="model_config.require",
                hint=f"Set device to auto or {kind_required}, or remove require.",
            )
        if text == "auto":
            return self.detect_optimal_device()
        probes = self._probes()
        match = _WISH.fullmatch(text)
        if match is None or match[1] not in probes:
            raise _unknown(wish, tuple(probes))
        kind, index = match[1], None if match[2] is None else int(match[2])
        ranked, absent = self._ranked({kind: probes[kind]})
        fitting = [device for device in ranked if index is None or index == (device.index or 0)]
        if fitting:
            return replace(fitting[0], reason=f"device {wish!r} was asked for")
        why = absent.get(kind) or f"there is {', '.join(device.torch_name for device in ranked)}"
        here = ", ".join(f"{device.torch_name} ({device.name})" for device in self.devices())
        raise ConfigurationError(
            f"device {wish!r} is not there: {why}",
            key="model_config.device",
            hint=f"This machine has {here or 'no device that can be used'}. Set device to one, or to auto.",
        )

    def validate_device_compatibility(self, spec: ModelShape, device: Device | None = None) -> CompatibilityReport:
        """Return whether `device` (the optimal one when None) can run the model, with remedies."""
        return check_compatibility(spec, self.detect_optimal_device() if device is None else device)

    def optimize_memory_settings(
        self, device: Device | None = None, *, compute_dtype: str | None = None
    ) -> MemorySettings:
        """Return how `device` (the optimal one when None) is best used, with the reason for each choice.

        `compute_dtype` is the type that products are to be made in, where the device can do that.
        """
        return best_settings(self.detect_optimal_device() if device is None else device, compute_dtype)

    def _probes(self) -> dict[str, Probe]:
        return known_probes() if self._given is None else self._given

    @staticmethod
    def _ranked(probes: Mapping[str, Probe]) -> tuple[tuple[Device, ...], dict[str, str]]:
        """Return the devices in the probes' order, a kind's by free memory, and the absent kinds' reasons."""
        devices, absent = run_probes(probes)
        order = list(dict.fromkeys(device.kind for device in devices))
        return tuple(sorted(devices, key=lambda one: (order.index(one.kind), -one.free_bytes))), absent


@cache
def get_device_manager() -> DeviceManager:
    """Return the device manager of this process."""
    return DeviceManager()


def _why(best: Device, others: tuple[Device, ...]) -> str:
    if any(other.kind == best.kind for other in others):
        return f"most free memory of the {best.kind} devices ({format_size(best.free_bytes)})"
    if best.kind == "cpu":
        return "no accelerator can be used"
    return f"the only {best.kind} device; an accelerator comes before the processor"


def _why_not(other: Device, best: Device) -> str:
    if other.kind == best.kind:
        return f"less free memory ({format_size(other.free_bytes)}) than {best.torch_name}"
    return f"{best.torch_name} is faster" if other.kind == "cpu" else f"{best.kind} comes before {other.kind}"


def _unknown(wish: str, kinds: tuple[str, ...]) -> ConfigurationError:
    near = get_close_matches(wish.strip().lower().partition(":")[0], ("auto", *kinds), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "An index goes after a colon, as in cuda:1."
    known = ", ".join(("auto", *kinds))
    message = f"device {wish!r} is not known; known are {known}"
    return ConfigurationError(message, key="model_config.device", hint=hint)


def _sentence(absent: Mapping[str, str]) -> str:
    return "; ".join(f"{kind}: {reason}" for kind, reason in absent.items()) or "there are no probes"
