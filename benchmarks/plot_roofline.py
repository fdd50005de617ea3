"""Draws rooflines as SVG, by hand: what a device can do at most, and where each measured case lies below it.

To the right: operations for each byte of weights that is read. Upward: operations a second. Both grow by decades.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .plot import GAP, OURS, PEERS, STYLE, WIDTH

LEFT, RIGHT = 80, 520  # of the area with the points; the list of points is beside it
HEIGHT, LINE = 380, 17  # of that area at least, and of a line of the list
RADIUS = 5
CEILINGS = (("bf16_operations_per_s", "bf16 products"), ("int8_operations_per_s", "int8 products"))
MORE_STYLE = ".axis { stroke: #ddd } .roof { stroke: #222; stroke-width: 1.5 } .middle { text-anchor: middle }"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Point:
    """One measured case: operations for each byte of weights, and operations a second."""

    label: str
    operations_per_byte: float
    operations_per_s: float


def roofline_svg(ceilings: Mapping[str, Any], groups: Mapping[str, Sequence[Point]], *, highlight: str) -> str:
    """Return an SVG with one roofline for each title; what is not known of `ceilings` is not drawn.

    Points whose labels begin with `highlight` are drawn in the stronger colour.
    """
    parts: list[str] = []
    top = GAP
    for title, points in groups.items():
        height = max(HEIGHT, LINE * len(points))
        if points:
            parts.append(f'<text class="title" x="{LEFT}" y="{top}">{escape(title)}</text>')
            parts += _Area(ceilings, points, top + GAP // 2, height).drawn(highlight)
            top += height + 4 * GAP
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    background = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    body = "\n".join([f"<style>{STYLE} {MORE_STYLE}</style>", background, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


class _Area:
    """The area of one roofline: where numbers lie in the picture, and what is drawn there."""

    def __init__(self, ceilings: Mapping[str, Any], points: Sequence[Point], top: int, height: int) -> None:
        self._read = ceilings.get("read_bytes_per_s")
        self._products = [(float(ceilings[key]), name) for key, name in CEILINGS if ceilings.get(key)]
        self._points = points
        self._top, self._bottom = top, top + height
        rates = [point.operations_per_s for point in points] + [rate for rate, _ in self._products]
        intensities = [point.operations_per_byte for point in points]
        if self._read:
            intensities += [rate / self._read for rate, _ in self._products]
        self._x = _decades(intensities)
        self._y = _decades(rates)

    def drawn(self, highlight: str) -> Iterator[str]:
        """Yield the axes, the ceilings, the points with their numbers, and the list of what they are."""
        yield from self._axes()
        yield from self._roofs()
        numbered = list(enumerate(self._points, 1))
        for number, point in sorted(numbered, key=lambda one: one[1].label.startswith(highlight)):  # those on top
            colour = OURS if point.label.startswith(highlight) else PEERS
            x, y = self._across(point.operations_per_byte), self._up(point.operations_per_s)
            listed = self._top + LINE * number - 4
            told = f"{number}  {point.label}: {_short(point.operations_per_s)}/s"
            yield f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}" stroke="white"/>'
            yield f'<text x="{x + RADIUS + 2:.1f}" y="{y + 4:.1f}">{number}</text>'
            yield f'<circle cx="{RIGHT + 2 * GAP}" cy="{listed - 4}" r="{RADIUS}" fill="{colour}"/>'
            yield f'<text x="{RIGHT + 2 * GAP + 10}" y="{listed}">{escape(told)}</text>'

    def _axes(self) -> Iterator[str]:
        for decade in range(self._x[0], self._x[1] + 1):
            x = self._across(10.0**decade)
            yield f'<line class="axis" x1="{x:.1f}" y1="{self._top}" x2="{x:.1f}" y2="{self._bottom}"/>'
            yield f'<text class="middle" x="{x:.1f}" y="{self._bottom + 16}">{_short(10.0**decade)}</text>'
        for decade in range(self._y[0], self._y[1] + 1):
            y = self._up(10.0**decade)
            yield f'<line class="axis" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>'
            yield f'<text class="label" x="{LEFT - 8}" y="{y + 4:.1f}">{_short(10.0**decade)}/s</text>'
        told = "operations for each byte of weights; upward: operations a second"
        yield f'<text x="{LEFT}" y="{self._bottom + 34}">{told}</text>'

    def _roofs(self) -> Iterator[str]:
        """Yield the slope that memory allows, up to the highest product, and each product's rate from there on."""
        if not self._read:
            return
        left, right = 10.0 ** self._x[0], 10.0 ** self._x[1]
        top = max((rate for rate, _ in self._products), default=10.0 ** self._y[1])
        begin = max(left, 10.0 ** self._y[0] / self._read)
        yield self._line(begin, self._read * begin, min(right, top / self._read), min(self._read * right, top))
        yield (
            f'<text x="{self._across(begin) + 8:.1f}" y="{self._up(self._read * begin) - 2:.1f}">'
            f"memory {_short(self._read)}B/s</text>"
        )
        for rate, name in self._products:
            yield self._line(rate / self._read, rate, right, rate)
            told = f"{name} {_short(rate)}/s"
            yield f'<text class="label" x="{RIGHT - 4}" y="{self._up(rate) - 4:.1f}">{told}</text>'

    def _line(self, x1: float, y1: float, x2: float, y2: float) -> str:
        ends = (self._across(x1), self._up(y1), self._across(x2), self._up(y2))
        return '<line class="roof" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends)

    def _across(self, value: float) -> float:
        low, high = self._x
        return LEFT + (RIGHT - LEFT) * (math.log10(value) - low) / (high - low)

    def _up(self, value: float) -> float:
        low, high = self._y
        return self._bottom - (self._bottom - self._top) * (math.log10(value) - low) / (high - low)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the powers of ten between which all values lie."""
    logarithms = [math.log10(value) for value in values]
    low, high = math.floor(min(logarithms)), math.ceil(max(logarithms))
    return low, max(high, low + 1)


def _short(value: float) -> str:
    """Return a number with three digits and a unit, such as 1.48T."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
