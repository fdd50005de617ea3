"""Sizes and ages in words and in numbers: "20GB" ⇄ 20_000_000_000 bytes, "30d" → 2_592_000 seconds.

GB is 10⁹ bytes and GiB is 2³⁰, as IEC 80000-13 has it; case and a space between number and unit do not matter.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_LARGE = (("TB", 4), ("GB", 3), ("MB", 2), ("KB", 1))  # powers of 1000
# No "m": whoever means months by it would lose what is six minutes old.
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_NAMED_AGES = (("year", 365 * 86_400), ("month", 30 * 86_400), ("day", 86_400), ("hour", 3600), ("minute", 60))
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]+)\s*")
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_size(text: str | int) -> int:
    """Return the number of bytes that `text` names.

    An integer is bytes. Raises ValueError, saying what is wrong, for an unknown unit, a negative or zero size, or
    a number without a unit in a string.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size; write one like 20GB or 16GiB")
    if isinstance(text, int):
        if text <= 0:
            raise ValueError(f"{text} bytes: a size must be above zero")
        return text
    if text.strip().startswith("-"):
        raise ValueError(f"{text!r}: a size must be above zero")
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write one like 20GB or 16GiB")
    number, unit = match.groups()
    factor = UNITS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r}: {unit!r} is not a unit of size; known are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    size = int(Decimal(number) * factor)
    if size <= 0:
        raise ValueError(f"{text!r}: a size must be above zero")
    return size


def format_size(size: int) -> str:
    """Return `size` bytes for a person, in powers of ten with three significant digits: 4_430_000_000 is "4.43 GB"."""
    if size < 0:
        return "-" + format_size(-size)
    value = float(size)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"


def format_spread(low: int, high: int) -> str:
    """Return what is between two sizes for a person, in one digit of doubt: "5.1 ± 0.1 GB"; both are in that."""
    half = (high - low) / 2
    if low < 0 or half < 0.5:
        return format_size(high)
    name, unit = next(((name, 1000**power) for name, power in _LARGE if high >= 1000**power), ("B", 1))
    digits = -math.floor(math.log10(half / unit))  # after the point; below 0 before it
    middle = round((low + high) / 2 / unit, digits)
    spread = math.ceil(max(high / unit - middle, middle - low / unit) * 10**digits - 1e-9) / 10**digits
    places = max(0, digits)
    return f"{middle:.{places}f} ± {spread:.{places}f} {name}"


def parse_age(text: str) -> float:
    """Return the number of seconds that `text` names: 30d, 12h, 2w, 45min or 90s.

    Raises ValueError, saying what is wrong, for an unknown unit, no unit, or an age that is not above zero.
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an age; write one like 30d, 12h or 2w")
    number, unit = match.groups()
    factor = SECONDS.get(unit.lower())
    if factor is None:
        raise ValueError(f"{text!r}: {unit!r} is not a unit of age; known are {', '.join(SECONDS)}")
    seconds = float(number) * factor
    if seconds <= 0:
        raise ValueError(f"{text!r}: an age must be above zero")
    return seconds


def parse_duration(text: str) -> float:
    """Return the number of seconds that `text` names: 300, 90s, 5m, 5min, 2h or 1d; a number alone is seconds.

    Raises ValueError, saying what is wrong, for an unknown unit or what is no number.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write one like 300, 90s, 5m or 2h")
    number, unit = match.groups()
    factor = {**SECONDS, "m": 60}.get(unit.lower() or "s")  # nobody means months by how long something is to wait
    if factor is None:
        raise ValueError(f"{text!r}: {unit!r} is not a unit of time; known are {', '.join(SECONDS)} and m")
    return float(number) * factor


def format_age(seconds: float) -> str:
    """Return how long ago something was, for a person: 259_200 is "3 days ago"."""
    for name, length in _NAMED_AGES:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
