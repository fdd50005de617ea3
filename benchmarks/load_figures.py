"""Measures one case of one side in a fresh process, and keeps what was measured of a shape.

Times are seconds from the start of the process where they say nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .load_sides import Case, Side
from .page_cache import EVICTED_SHARE, evict, warm
from .processes import Run, run_watched

Figures = Mapping[str, Any]


@dataclass
class ShapeResults:
    """All that is known of one shape so far; grows while measuring, so that an interrupted run loses nothing.

    `once` are the seconds that users of a side pay once, `left_out` the reasons why a side is missing, by label.
    """

    name: str
    checkpoint_bytes: int
    disk_bytes_per_s: float | None
    once: dict[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    runs: dict[tuple[str, Case], list[Figures]] = field(default_factory=dict)

    def add(self, label: str, case: Case, figures: Figures) -> None:
        """Keep one run."""
        self.runs.setdefault((label, case), []).append(figures)

    def medians(self, label: str, case: Case) -> dict[str, Any] | None:
        """Return the median of every figure of a case, or None where it was not measured."""
        runs = self.runs.get((label, case))
        return medians(runs) if runs else None

    def told(self) -> dict[str, Any]:
        """Return everything as plain values, for the JSON line."""
        cases = [
            {"side": label, "case": case.name, "medians": medians(runs), "runs": runs}
            for (label, case), runs in self.runs.items()
        ]
        return {
            "shape": self.name,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes_per_s": self.disk_bytes_per_s,
            "once_s": self.once,
            "left_out": self.left_out,
            "cases": cases,
        }


def measure_case(side: Side, case: Case) -> dict[str, Any]:
    """Make the page cache cold or warm, load in a fresh process, and return the figures."""
    side.begin(case)
    os.sync()  # what another side wrote is not to be written while this one reads
    files = side.reads(case)
    share = evict(files) if case.is_cold else warm(files)
    read_bytes = sum(file.stat().st_size for file in side.weights(case))
    run = run_watched(side.module, json.dumps(side.task(case)), environment=side.environment())
    return {**figures_of(run, read_bytes), "resident_share_before": share, "read_bytes": read_bytes}


def figures_of(run: Run, read_bytes: int) -> dict[str, Any]:
    """Return what one process's moments mean; `read_bytes` are those of the weights that it had to read.

    They count as read when all are in memory, where that was watched, else when the load is done.
    """
    found = dict(run.found)
    at = found.pop("at")
    load_s = at["loaded"] - at["imported"]
    resident_s = None if at["resident"] is None else at["resident"] - at["imported"]
    return {
        "imports_s": at["imported"] - run.spawned,
        "load_s": load_s,
        "ready_s": at["loaded"] - run.spawned,
        "first_token_s": at["answered"] - run.spawned,
        "resident_s": resident_s,
        "read_bytes_per_s": read_bytes / (load_s if resident_s is None else resident_s),
        "process_s": run.ended - run.spawned,
        "peak_anonymous_bytes": _largest(run.peak_anonymous_bytes, found["anonymous_bytes"]),
        **found,
    }


def _largest(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


def is_as_asked(case: Case, figures: Figures) -> bool:
    """Tell whether the page cache was as cold or as warm as the case says."""
    share = figures["resident_share_before"]
    return bool(share <= EVICTED_SHARE if case.is_cold else share >= 1 - EVICTED_SHARE)


def medians(runs: Sequence[Figures]) -> dict[str, Any]:
    """Return the median of each number that all runs have, also of those in mappings; words as the first has them."""
    found: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [run.get(key) for run in runs]
        if isinstance(value, Mapping):
            found[key] = medians([one for one in values if isinstance(one, Mapping)])
        else:
            numbers = [float(one) for one in values if isinstance(one, int | float)]
            no_number = value if isinstance(value, str) else None
            found[key] = statistics.median(numbers) if len(numbers) == len(runs) else no_number
    return found
