"""Tells people what `benchmarks.memory` measured: a row for each load, and how far each prediction was off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .memory_cases import Case

TOO_HIGH_SHARE, TOO_HIGH_BYTES = 0.03, 150 << 20  # a prediction may be higher by the larger of the two

HEADINGS = (
    "load: planned", "taken", "answering: planned", "taken (peak)", "at the end", "too high by", "share", "",
)  # fmt: skip


def predicted(found: Mapping[str, Any]) -> int:
    """Return the most that was planned for."""
    planned = found["predicted"]
    return int(max(planned["load_peak"], planned["steady"]))


def error(found: Mapping[str, Any]) -> int:
    """Return by how many bytes the prediction was higher than the peak; below 0 the promise was broken."""
    return predicted(found) - int(found["peak_bytes"])


def is_kept(found: Mapping[str, Any]) -> bool:
    """Tell whether the peak was never above the prediction, and the prediction not much above the peak."""
    return 0 <= error(found) <= max(TOO_HIGH_SHARE * found["peak_bytes"], TOO_HIGH_BYTES)


@dataclass(frozen=True)
class Taken:
    """What a peer (`label`) takes in a case, or says that it would, in bytes; `wish` is the case's."""

    label: str
    wish: str
    size: int


def table_of(runs: Sequence[tuple[Case, Mapping[str, Any]]], peers: Sequence[Taken] = ()) -> Table:
    """Return a row for each load, with what peers take in the same case at its end; sizes in MB (10⁶ bytes)."""
    kept = sum(is_kept(found) for _, found in runs)
    table = Table(title=f"Predicted and taken, MB; {kept} of {len(runs)} loads within the bar", title_justify="left")
    table.add_column("load", no_wrap=True)
    labels = [*dict.fromkeys(one.label for one in peers)]
    for heading in (*HEADINGS, *labels):
        table.add_column(heading, justify="right")
    theirs = {(one.wish, one.label): f"{one.size / 1e6:.0f}" for one in peers}
    for case, found in runs:
        planned, off = found["predicted"], error(found)
        sizes = (
            planned["load_peak"], found["settled_peak_bytes"], planned["steady"], found["peak_bytes"],
            found["full_rss_bytes"], off,
        )  # fmt: skip
        share = f"{100 * off / found['peak_bytes']:.1f} %"
        mark = "" if is_kept(found) else "✗"
        beside = (theirs.get((case.wish, label), "") for label in labels)
        table.add_row(case.name, *(f"{size / 1e6:.0f}" for size in sizes), share, mark, *beside)
    return table
