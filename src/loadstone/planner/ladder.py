"""The ways to keep and serve a model, from the best to the least."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadstone.hardware.device import Device

    from .plan import Plan

# Best quality first; a plug-in is used only when asked for by name.
LADDER = ("none", "8bit", "4bit")
LADDER_WITH_INTEGERS = ("none", "8bit", "int4", "4bit")  # where integers are multiplied faster; NF4 takes less
# More context than this is kept only when asked for: it costs memory from the start, and few prompts need it.
CONTEXT_UNLESS_ASKED = 4096
SHORTEST_CONTEXT = 512
SMALLEST_CHUNK = 16  # tokens of a prompt at a time; fewer would save next to nothing


@dataclass(frozen=True)
class Way:
    """A strategy, how many prompt tokens are read at a time, and how many streams are served."""

    strategy: str
    chunk: int
    streams: int


@dataclass(frozen=True)
class Below:
    """A plan that memory did not suffice for, and whether the weights alone were too much."""

    plan: Plan
    in_weights: bool = False


def ladder_of(device: Device, *, has_kernels: bool) -> tuple[tuple[str, ...], str]:
    """Return the strategies that `auto` chooses from on a device, and why integers are among them, or "".

    `has_kernels` tells whether our own can be had on this processor.
    """
    if device.kind == "mps":
        return LADDER_WITH_INTEGERS, "Metal has a product of 4-bit integers, and none of NF4"
    if device.kind == "cpu" and not has_kernels and "avx2" in device.capabilities and sys.platform != "win32":
        return LADDER_WITH_INTEGERS, "torch has a product of 4-bit integers, and our kernels for NF4 cannot be had here"
    return LADDER, ""


def smaller(number: int, least: int) -> Iterator[int]:
    """Yield half of a number, half of that and so on, down to `least`."""
    while number > least:
        number = max(number // 2, least)
        yield number
