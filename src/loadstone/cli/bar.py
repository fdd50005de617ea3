"""A bar of parts, drawn with block characters, or with plain ones where a terminal's encoding has no blocks."""

from __future__ import annotations

import locale
from collections.abc import Sequence
from dataclasses import dataclass

from loadstone.units import format_size

BLOCKS, PLAIN = "█▓▒░·", "#=+-."
LIMITS = {BLOCKS: "│", PLAIN: "|"}


@dataclass(frozen=True)
class Bar:
    """What is drawn: `line`, and the `legend` that says what stands for what."""

    line: str
    legend: str


def draw(parts: Sequence[tuple[str, int]], allowed: int, *, width: int = 60, characters: str = BLOCKS) -> Bar:
    """Return a bar of `width` characters for the bytes of `parts` (four at most) and what is free of `allowed`.

    Every part that is not nothing has a character at least. Where the parts are more than what is allowed, a line
    stands where that ends.
    """
    total = sum(size for _, size in parts)
    free = max(0, allowed - total)
    named = [*parts, ("free", free)]
    cells = _cells([size for _, size in named], width)
    line = "".join(character * count for character, count in zip(characters, cells, strict=False))
    if total > allowed:
        place = min(width - 1, allowed * width // total)
        line = line[:place] + LIMITS[characters] + line[place + 1 :]
    shown = [
        f"{character} {name} {format_size(size)}" for character, (name, size) in zip(characters, named, strict=False)
    ]
    if total > allowed:
        shown[-1] = f"{LIMITS[characters]} allowed {format_size(allowed)}"
    return Bar(line, "  ".join(shown))


def characters_for_terminal() -> str:
    """Return the characters that the locale's encoding has."""
    try:
        (BLOCKS + LIMITS[BLOCKS]).encode(locale.getencoding())
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BLOCKS


def _cells(sizes: Sequence[int], width: int) -> list[int]:
    """Return how many characters each size has: its share, rounded, at least one, and `width` in all."""
    total = sum(sizes) or 1
    cells = [max(1, round(size * width / total)) if size else 0 for size in sizes]
    while (excess := sum(cells) - width) and any(cells):
        cells[cells.index(max(cells))] -= 1 if excess > 0 else -1
    return cells
