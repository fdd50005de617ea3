"""Draws horizontal bars as SVG, by hand: a picture of a few numbers needs no library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LABELS, VALUES = 960, 340, 80  # of the picture, of the labels at the left, of the numbers at the right
ROW, BAR, GAP = 24, 16, 20
OURS, PEERS = "#1f6f8b", "#b0b7bd"
STYLE = "text { font: 13px sans-serif; fill: #222 } .title { font-weight: bold } .label { text-anchor: end }"


def bars_svg(groups: Mapping[str, Sequence[tuple[str, float]]], *, highlight: str) -> str:
    """Return an SVG with one group of bars for each title; longest first is not assumed, zero is at the left.

    Each group has a scale of its own. Labels that begin with `highlight` are drawn in the stronger colour.
    """
    parts: list[str] = []
    top = GAP
    for title, bars in groups.items():
        parts.append(f'<text class="title" x="{LABELS}" y="{top}">{escape(title)}</text>')
        longest = max((value for _, value in bars), default=0.0) or 1.0
        for row, (label, value) in enumerate(bars):
            colour = OURS if label.startswith(highlight) else PEERS
            parts += _bar(label, value, value / longest, colour, top + BAR // 2 + row * ROW)
        top += ROW * (len(bars) + 1) + GAP
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    background = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    body = "\n".join([f"<style>{STYLE}</style>", background, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def _bar(label: str, value: float, share: float, colour: str, top: int) -> list[str]:
    """Return a bar with its label before it and its value behind it."""
    length = max(1.0, share * (WIDTH - LABELS - VALUES))
    text = top + BAR - 4  # where the letters stand
    return [
        f'<text class="label" x="{LABELS - 8}" y="{text}">{escape(label)}</text>',
        f'<rect x="{LABELS}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<text x="{LABELS + length + 6:.1f}" y="{text}">{value:.2f}</text>',
    ]
