"""Measures one case of one side in a fresh process, and keeps what was measured of a shape.

Times are seconds from the start of the process where they say nothing else.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from .disk import direct_read_rate
from .load_sides import Case, Side
from .page_cache import EVICTED_SHARE, evict, warm
from .processes import Run, run_watched
from .results import Figures, Results


@dataclass
class ShapeResults(Results[Case]):
    """The results of one shape, with the bytes of its checkpoint's weights."""

    checkpoint_bytes: int

    def disk_rates(self) -> list[float]:
        """Return what the disk gave after each cold load, bytes a second."""
        rates = [figures.get("disk_bytes_per_s") for runs in self.runs.values() for figures in runs]
        return sorted(rate for rate in rates if rate is not None)

    def told(self) -> dict[str, Any]:
        """Return everything as plain values, for the JSON line."""
        return {**super().told(), "checkpoint_bytes": self.checkpoint_bytes}


def measure_case(side: Side, case: Case) -> dict[str, Any]:
    """Make the page cache cold or warm, load in a fresh process, and return the figures."""
    side.begin(case)
    os.sync()  # what another side wrote is not to be written while this one reads
    files = side.reads(case)
    share = evict(files) if case.is_cold else warm(files)
    read_bytes = sum(file.stat().st_size for file in side.weights(case))
    run = run_watched(side.module, json.dumps(side.task(case)), environment=side.environment())
    figures = {**figures_of(run, read_bytes), "resident_share_before": share, "read_bytes": read_bytes}
    # Right after, because what a virtual disk gives changes from minute to minute.
    disk = direct_read_rate(max(side.weights(case), key=lambda file: file.stat().st_size)) if case.is_cold else None
    return {
        **figures,
        "disk_bytes_per_s": disk,
        "disk_share": None if disk is None else figures["read_bytes_per_s"] / disk,
    }


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
