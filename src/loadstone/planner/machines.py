"""Machines that one does not have: by name from a table of public figures, or described in a few words.

Gives a `Device` as a probe would, its speeds, and what was assumed of it. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from loadstone.errors import ConfigurationError
from loadstone.hardware import Device
from loadstone.hardware.speeds import Figure, Speeds
from loadstone.units import format_size, parse_size

from .machine_table import CARDS, GB, MACS, TYPICAL

USUAL = frozenset({"avx2", "fma", "f16c"})
"""What processors of the last ten years can do."""

LEAST_KEPT, MOST_KEPT = 2 * GB, 8 * GB
KEPT_ON_CARD = 0.6 * GB
LARGE_MAC = 36 * 2**30
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_EXAMPLES = "cpus=4,ram=16GB,bandwidth=40GB/s or vram=12GB,bandwidth=360GB/s"


@dataclass(frozen=True)
class Machine:
    """A machine to plan for: `source` is where its figures are published, `assumed` what is not known of it."""

    name: str
    device: Device
    speeds: Speeds
    source: str
    assumed: tuple[str, ...]


def known_machines() -> tuple[str, ...]:
    """Return the names that `find_machine` knows."""
    return (*CARDS, *MACS, *TYPICAL)


def find_machine(wish: str) -> Machine:
    """Return the machine that is called `wish` or described by it, like "cpus=4,ram=16GB,bandwidth=40GB/s".

    In a description `cpus` (cores), `ram`, `bandwidth`, `disk`, `tflops` and `features` ("avx2+avx512_vnni") make a
    processor, and `vram`, `bandwidth`, `disk` and `tflops` a GPU. Raises ConfigurationError for what means neither.
    """
    text = wish.strip().lower()
    if "=" in text:
        return _described(wish.strip())
    if text in CARDS:
        name, memory, rate, tflops, source = CARDS[text]
        return _card(text, name, memory, Speeds(Figure(rate * GB, source, is_peak=True), _tera(tflops, source)), source)
    if text in MACS:
        name, memory, rate, source = MACS[text]
        return _mac(text, name, memory, Speeds(Figure(rate * GB, source, is_peak=True)), source)
    if text in TYPICAL:
        name, memory, rate, cores, source = TYPICAL[text]
        return _processor(text, name, memory, cores, USUAL, Speeds(Figure(rate * GB, source, is_peak=True)), source)
    near = get_close_matches(text, known_machines(), n=3, cutoff=0.4)
    hint = f"Near it: {', '.join(near)}." if near else f"Known are {', '.join(known_machines())}."
    raise ConfigurationError(
        f"machine {wish!r} is not known", key="machine", hint=f"{hint} Or write it like {_EXAMPLES}."
    )


def _tera(tflops: float | None, source: str) -> Figure | None:
    return None if tflops is None else Figure(tflops * 1e12, source, is_peak=True)


def _card(name: str, title: str, memory: int, speeds: Speeds, source: str) -> Machine:
    free = max(0, round(memory - KEPT_ON_CARD))
    # Only the 20 series and older have no bfloat16: of the table, T4 and V100.
    old = name.startswith(("t4", "v100"))
    capabilities = frozenset({"float16"} if old else {"float16", "bfloat16"})
    device = Device("cuda", 0, title, memory, free, capabilities=capabilities, reason=f"as {name}")
    kept = f"{format_size(memory - free)} of its memory is kept by the driver and the screen"
    return Machine(name, device, speeds, source, (kept, "nothing else runs on it"))


def _mac(name: str, title: str, memory: int, speeds: Speeds, source: str) -> Machine:
    share = 3 / 4 if memory > LARGE_MAC else 2 / 3
    total = round(memory * share)
    device = Device(
        "mps", 0, title, total, total, capabilities=frozenset({"float16"}), reason=f"as {name}",
        largest_buffer_bytes=memory // 2,
    )  # fmt: skip
    kept = f"Metal recommends {format_size(total)} of {format_size(memory)} for its GPU, and all of that is free"
    return Machine(name, device, speeds, source, (kept, f"one buffer has at most half, {format_size(memory // 2)}"))


def _processor(
    name: str, title: str, memory: int, cores: int, features: frozenset[str], speeds: Speeds, source: str
) -> Machine:
    kept = min(max(memory // 4, LEAST_KEPT), MOST_KEPT)
    free = max(0, memory - kept)
    device = Device("cpu", None, title, memory, free, cores, features, reason=f"as {name}")
    assumed = (
        f"the system and other programs keep {format_size(min(kept, memory))} of {format_size(memory)}",
        f"{cores} cores with {', '.join(sorted(features)) or 'no vector instructions that matter'}, on Linux",
    )
    return Machine(name, device, speeds, source, assumed)


# -- described in words -----------------------------------------------------------------------------------------------


def _described(text: str) -> Machine:
    said: dict[str, Any] = {}
    for part in text.split(","):
        key, separator, value = (one.strip() for one in part.lower().partition("="))
        if key not in _READERS or not separator:
            near = get_close_matches(key, _READERS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(_READERS)}."
            raise ConfigurationError(f"machine: {part.strip()!r} is not understood", key="machine", hint=hint)
        if key in said:
            raise ConfigurationError(f"machine: {key} is said twice", key="machine")
        said[key] = _read(key, value)
    source = "as described"
    figures = {key: Figure(said[key], source) for key in ("bandwidth", "tflops", "disk") if key in said}
    speeds = Speeds(figures.get("bandwidth"), figures.get("tflops"), figures.get("disk"))
    if "vram" in said:
        _refuse_beside("vram", said, ("cpus", "ram", "features"))
        return _card(text, "GPU as described", said["vram"], speeds, source)
    if "ram" not in said:
        raise ConfigurationError("machine: its memory is missing", key="machine", hint="Add ram=16GB, or vram=12GB.")
    features = said.get("features", USUAL)
    return _processor(text, "processor as described", said["ram"], said.get("cpus", 4), features, speeds, source)


def _refuse_beside(key: str, said: Mapping[str, Any], others: tuple[str, ...]) -> None:
    if found := [other for other in others if other in said]:
        raise ConfigurationError(
            f"machine: {key} is a GPU's and {', '.join(found)} a processor's",
            key="machine",
            hint="Describe one of the two: models are kept on one device.",
        )


def _read(key: str, value: str) -> Any:
    try:
        return _READERS[key](value)
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(f"machine: {key}: {error}", key="machine") from None


def _rate(value: str) -> float:
    size, separator, unit = value.partition("/")
    if separator and unit.strip() != "s":
        raise ValueError(f"{value!r} is not a rate; write one like 40GB/s")
    return float(parse_size(size))


def _cores(value: str) -> int:
    if not value.isdigit() or not 1 <= int(value) <= 4096:
        raise ValueError(f"{value!r} is not a number of cores")
    return int(value)


def _trillions(value: str) -> float:
    if not _NUMBER.fullmatch(value) or float(value) <= 0:
        raise ValueError(f"{value!r} is not a number of 10¹² operations a second")
    return float(value) * 1e12


def _features(value: str) -> frozenset[str]:
    return frozenset(one.strip() for one in value.split("+") if one.strip())


_READERS: dict[str, Callable[[str], Any]] = {
    "cpus": _cores, "ram": parse_size, "vram": parse_size, "bandwidth": _rate, "disk": _rate, "tflops": _trillions,
    "features": _features,
}  # fmt: skip
