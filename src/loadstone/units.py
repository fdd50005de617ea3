"""Sizes in words and in bytes: "20GB" ⇄ 20_000_000_000.

GB is 10⁹ bytes and GiB is 2³⁰, as IEC 80000-13 has it; case and a space between number and unit do not matter.
"""

from __future__ import annotations

import re
from decimal import Decimal

UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]+)\s*")


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
    match = _SIZE.fullmatch(text)
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
