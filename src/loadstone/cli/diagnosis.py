"""Looks at the machine and the installation for `loadstone doctor`, and judges what it finds.

Nothing here raises for what it finds: a broken library is a finding. Asks no network.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from loadstone.errors import LoadstoneError
from loadstone.hardware import Check, Device, get_device_manager, memory_limits
from loadstone.units import format_size

from .folders import check_folder, check_store
from .interrupts import HeldInterrupts
from .listening import heard

NEEDED = (
    "torch", "bitsandbytes", "llvmlite", "safetensors", "tokenizers", "gguf", "huggingface_hub", "jinja2", "numpy",
    "pydantic", "PyYAML", "psutil", "platformdirs", "click", "rich",
)  # fmt: skip
OPTIONAL = {"transformers": "only the transformers view of a model needs it"}
OLDEST_TORCH = (2, 9)
LITTLE_MEMORY = 2 * 10**9  # bytes: a process with torch and a small model takes about one and a half
LITTLE_DISK = 16 * 10**9  # bytes: the default model's download takes 15.2 GB


@dataclass
class Diagnosis:
    """What was found: `checks` are judgements, the rest are facts as plain values (bytes in bytes)."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """True when nothing that is required is broken."""
        return all(check.ok or not check.required for check in self.checks)

    @property
    def problems(self) -> list[Check]:
        """The checks that are not well, those that keep Loadstone from working first."""
        return sorted((check for check in self.checks if not check.ok), key=lambda check: not check.required)


def diagnose() -> Diagnosis:
    """Look at everything; takes as long as importing torch and bitsandbytes does."""
    found = Diagnosis()
    for look in (_versions, _devices, _kernels, _memory, _disk, _network, _configuration, _store, _bundled, _plug_ins):
        look(found)
    return found


def _versions(found: Diagnosis) -> None:
    versions = {"loadstone": _version("loadstone"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    found.facts["versions"] = versions
    found.facts["platform"] = platform.platform()
    missing = [name for name in NEEDED if versions[name] is None]
    text = f"Python {versions['python']}, torch {versions['torch'] or 'missing'}"
    if missing:
        remedy = f"Run: {sys.executable} -m pip install {' '.join(missing)}"
        found.checks.append(Check("packages", False, f"missing: {', '.join(missing)}", remedy))
    else:
        found.checks.append(Check("packages", True, text))
    if versions["torch"] is not None:
        found.checks.append(_torch(versions["torch"]))


def _torch(installed: str) -> Check:
    oldest = ".".join(map(str, OLDEST_TORCH))
    remedy = f"Run: {sys.executable} -m pip install --upgrade 'torch>={oldest}'"
    if _numbers(installed) < OLDEST_TORCH:
        return Check("torch", False, f"{installed} is too old", remedy)
    problem = _import_problem("torch")
    if problem is not None:
        return Check("torch", False, f"it cannot be imported: {problem}", f"Reinstall it. {remedy}")
    return Check("torch", True, f"{installed} can be imported")


def _devices(found: Diagnosis) -> None:
    manager = get_device_manager()
    absent = manager.absent()
    try:
        best = manager.detect_optimal_device()
        devices = manager.devices()
    except LoadstoneError as error:
        found.facts["devices"], found.facts["absent_devices"] = [], dict(absent)
        found.checks.append(Check("device", False, error.message, error.hint or "Reinstall torch."))
        return
    found.facts["devices"] = [_device_facts(device, best) for device in devices]
    found.facts["absent_devices"] = dict(absent)
    found.checks.append(Check("device", True, f"{best.torch_name}: {best.name} ({best.reason})"))
    found.checks += [
        Check(f"device {kind}", False, reason, "Update its driver or plug-in; until then it is not used.", False)
        for kind, reason in absent.items()
        if reason.startswith("its probe failed")
    ]


def _device_facts(device: Device, best: Device) -> dict[str, Any]:
    name = device.torch_name
    chosen = name == best.torch_name
    why_not = (reason for kind, _, reason in (one.partition(": ") for one in best.passed_over) if kind == name)
    return {
        "device": name,
        "name": device.name,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "cores": device.cores,
        "capabilities": sorted(device.capabilities),
        "chosen": chosen,
        "reason": best.reason if chosen else "",
        "passed_over": next(why_not, ""),
    }


def _kernels(found: Diagnosis) -> None:
    reason = _kernel_problem()
    has_avx2 = any("avx2" in device["capabilities"] for device in found.facts["devices"])
    what = "This processor could have them: mend what is told here, and see whether the own cache is well."
    what = what if has_avx2 else "The fast kernels need an x86 processor with AVX2."
    remedy = f"Answers come all the same, several times more slowly. {what}"
    text = "fast products on the processor: compiled, and agree with torch"
    found.checks.append(
        Check("CPU kernels", reason is None, reason or text, "" if reason is None else remedy, required=False)
    )
    problem = _import_problem("bitsandbytes")
    needs_it = any(device["device"].startswith("cuda") for device in found.facts["devices"])
    remedy = f"Run: {sys.executable} -m pip install --force-reinstall bitsandbytes"
    text = f"cannot be imported: {problem}" if problem else "can be imported"
    found.checks.append(
        Check("bitsandbytes", problem is None, text, remedy if problem else "", required=needs_it and bool(problem))
    )
    found.facts["kernels"] = {
        "cpu": {"usable": reason is None, "reason": reason},
        "bitsandbytes": {"usable": problem is None, "reason": problem},
    }


def _kernel_problem() -> str | None:
    """Return why the processor's kernels cannot be used here; None when they were made and found right."""
    with heard("kernels.warning") as events:
        try:
            from loadstone.quantization.kernels.cpu import cpu_kernels, why_not

            if cpu_kernels() is not None:
                return None
            reasons = [str(event.fields["reason"]) for event in events]
            return why_not() or next(iter(reasons), "they could not be compiled")
        except Exception as error:  # noqa: BLE001 - a broken torch is a finding like any other
            return _first_line(error)


def _memory(found: Diagnosis) -> None:
    limits = memory_limits()
    binding = limits.binding
    found.facts["memory"] = {
        "physical_bytes": limits.physical_bytes,
        "available_bytes": limits.available_bytes,
        "limit_bytes": limits.limit_bytes,
        "free_bytes": limits.free_bytes,
        "container_limits": [asdict(group) for group in limits.cgroups],
    }
    by = f", because of the container limit {binding.path}" if binding else ""
    text = f"{format_size(limits.free_bytes)} can be had of {format_size(limits.limit_bytes)}{by}"
    remedy = "Raise the container's memory limit." if binding else "Close other programs, or choose a smaller model."
    well = limits.free_bytes >= LITTLE_MEMORY
    found.checks.append(Check("memory", well, text, "" if well else remedy, required=False))


def _disk(found: Diagnosis) -> None:
    from loadstone.folders import cache_folder
    from loadstone.sources.cache import hub_root

    found.facts["disk"] = []
    for name, folder, knob, wanted in (
        ("downloads", hub_root(), "HF_HOME", LITTLE_DISK),
        ("own cache", cache_folder(), "LOADSTONE_HOME", 0),
    ):
        found.checks.append(check_folder(name, folder, knob, wanted, found.facts["disk"]))


def _network(found: Diagnosis) -> None:
    from loadstone.sources.fetch import OFFLINE_VARIABLES, is_offline
    from loadstone.sources.hub import endpoint

    named = {name: os.environ[name] for name in OFFLINE_VARIABLES if os.environ.get(name)}
    has_token = bool(os.environ.get("HF_TOKEN"))
    found.facts["network"] = {"offline": is_offline(), "settings": named, "endpoint": endpoint(), "token": has_token}
    said = ", ".join(f"{name}={value}" for name, value in named.items())
    text = f"offline ({said}): only models on this machine" if is_offline() else f"models are fetched from {endpoint()}"
    found.checks.append(Check("network", True, text))


def _configuration(found: Diagnosis) -> None:
    from loadstone.config import ConfigManager

    try:
        manager = ConfigManager()
    except LoadstoneError as error:
        found.facts["configuration"] = {"files": [], "error": error.message}
        found.checks.append(Check("configuration", False, error.message, error.hint or "Correct it."))
        return
    wish = manager.config.model
    files = [str(file) for file in manager.files]
    found.facts["configuration"] = {"files": files, "error": None, "model": wish.model_dump()}
    place = ", ".join(files) or "no file: defaults"
    found.checks.append(Check("configuration", True, f"{place}; {wish.base_model} in {wish.strategy}"))
    if wish.offline:
        found.facts["network"]["offline"] = True
        where = manager.origin("model_config.offline")
        found.checks.append(Check("offline", True, f"{where} says so: only models on this machine"))


def _store(found: Diagnosis) -> None:
    from loadstone.config import ConfigManager
    from loadstone.store import open_store

    try:
        manager = ConfigManager()
    except LoadstoneError:  # told already
        found.facts["store"] = None
        return
    store = open_store(manager.config.store)
    check, found.facts["store"] = check_store(store, manager.origin("store.enabled"))
    found.checks.append(check)


def _bundled(found: Diagnosis) -> None:
    from loadstone.sources import resolve

    try:
        files = resolve("smollm2")
    except LoadstoneError as error:
        found.facts["bundled_model"] = None
        remedy = f"{error.hint or ''} It is only for trying things out."
        found.checks.append(Check("bundled model", False, error.message, remedy, required=False))
        return
    found.facts["bundled_model"] = str(files.weights[0])
    found.checks.append(Check("bundled model", True, "smollm2 is installed"))


def _plug_ins(found: Diagnosis) -> None:
    from loadstone.checkpoint.architectures import ARCHITECTURES
    from loadstone.hardware.probes import DEVICES
    from loadstone.quantization import STRATEGIES
    from loadstone.sources import SOURCES

    found.facts["plug_ins"], found.facts["known"] = [], {}
    for door in (STRATEGIES, DEVICES, SOURCES, ARCHITECTURES):
        for plug_in in door.plug_ins():
            found.facts["plug_ins"].append(asdict(plug_in))
            text = plug_in.problem or f"{plug_in.group}, from {plug_in.package}"
            remedy = f"It is passed over. Update or uninstall {plug_in.package}." if plug_in.problem else ""
            found.checks.append(Check(f"plug-in {plug_in.name}", not plug_in.problem, text, remedy, required=False))
        found.facts["known"][door.group.partition(".")[2]] = list(door.names())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(installed: str) -> tuple[int, ...]:
    parts = installed.split("+")[0].split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def _import_problem(name: str) -> str | None:
    try:
        with HeldInterrupts():
            import_module(name)
    except Exception as error:  # noqa: BLE001 - a library may fail to load in any way
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
