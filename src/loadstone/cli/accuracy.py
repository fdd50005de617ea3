"""`loadstone plan --accuracy`: what earlier loads on this machine were planned to take, and took."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

from loadstone.units import format_size

from .output import heading, rows, table, write_json

if TYPE_CHECKING:
    from loadstone.planner.accuracy import LoadRecord

TITLES = (
    "when", "model", "strategy", "streams × context", "from", "load: planned", "taken", "beside: planned", "at most",
    "at the end", "too high by",
)  # fmt: skip
NOT_SEEN = "?"


def tell_accuracy(*, as_json: bool) -> None:
    """Write what is remembered of earlier loads, oldest first."""
    from loadstone.folders import cache_folder
    from loadstone.planner.accuracy import NAME, read_records

    records = read_records(cache_folder())
    if as_json:
        write_json({"file": str(cache_folder() / NAME), "loads": [_facts(one) for one in records]})
        return
    heading(sys.stdout, f"{len(records)} loads remembered in {cache_folder() / NAME}", is_first=True)
    if records:
        table(sys.stdout, TITLES, [_cells(one) for one in records])
        text = "what the process had beside weights and KV cache from the load to the end; ? was not seen"
        rows(sys.stdout, [("beside", text)])


def _facts(one: LoadRecord) -> dict[str, Any]:
    return {**vars(one), "planned_beside": one.planned_beside, "too_high_by": one.errors}


def _cells(one: LoadRecord) -> tuple[str, ...]:
    def size(taken: int | None) -> str:
        return NOT_SEEN if taken is None else format_size(taken)

    off = min(one.errors, default=None)
    sign = "-" if off is not None and off < 0 else ""
    return (
        datetime.fromtimestamp(one.time).strftime("%Y-%m-%d %H:%M"),
        one.model,
        one.strategy,
        f"{one.streams} × {one.context}",
        "store" if one.from_store else "files",
        format_size(one.planned_load_peak),
        size(one.load_peak),
        format_size(one.planned_beside),
        size(one.beside),
        size(one.idle),
        NOT_SEEN if off is None else f"{sign}{format_size(abs(off))}",
    )
