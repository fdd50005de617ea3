"""Tells people what `benchmarks.load` measured: one table a shape, and the notes below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from loadstone.units import format_size

from .load_figures import ShapeResults, is_as_asked
from .load_sides import CASES, Case

# key among the medians, heading, how a value is written; rates and shares of the disk's are for cold loads only
COLUMNS = (
    ("ready_s", "ready", "{:.2f} s"),
    ("imports_s", "imports", "{:.2f} s"),
    ("first_token_s", "first token", "{:.2f} s"),
    ("read_bytes_per_s", "GB/s", "rate"),
    ("disk_share", "of disk", "share"),
    ("resident_s", "resident", "{:.2f} s"),
    ("peak_rss_bytes", "peak RSS", "size"),
    ("rss_bytes", "RSS", "size"),
    ("private_bytes", "private", "size"),
    ("peak_anonymous_bytes", "peak anon.", "size"),
    ("anonymous_bytes", "anon.", "size"),
)
ORDER = (CASES[0], CASES[3], CASES[1], CASES[2])  # for people: first loads, then later ones


def table_of(results: ShapeResults) -> Table:
    """Return a shape's table: a section for each case, a row for each side."""
    table = Table(title=f"{results.name}, {format_size(results.checkpoint_bytes)} of weights", title_justify="left")
    table.add_column("side", no_wrap=True)
    table.add_column("runs", justify="right")
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for case in ORDER:
        labels = [label for label, measured in results.runs if measured == case]
        if not labels:
            continue
        table.add_section()
        table.add_row(case.name, style="bold")
        for label in labels:
            found = results.medians(label, case) or {}
            cells = [_written(found.get(key), form, case) for key, _, form in COLUMNS]
            table.add_row(f"  {label}", str(len(results.runs[label, case])), *cells)
    return table


def _written(value: float | None, form: str, case: Case) -> str:
    if value is None or (form == "rate" and not case.is_cold):  # a warm load reads no disk
        return ""
    if form == "rate":
        return f"{value / 1e9:.2f}"
    if form == "share":
        return f"{value:.0%}"
    return format_size(int(value)) if form == "size" else form.format(value)


def notes_of(results: ShapeResults) -> Iterator[str]:
    """Yield what stands below a shape's table."""
    if rates := results.disk_rates():
        yield f"after cold loads the disk gave {rates[0] / 1e9:.2f} to {rates[-1] / 1e9:.2f} GB/s to direct reads"
    else:
        yield "the disk cannot be read directly"
    for case in ORDER:
        for label in [label for label, measured in results.runs if measured == case]:
            phases = (results.medians(label, case) or {}).get("phases_s")
            if phases:
                yield f"{label}, {case.name}: " + ", ".join(f"{name} {took:.2f} s" for name, took in phases.items())
    for label, seconds in results.once.items():
        if seconds:
            yield f"{label}, once before the first load: " + ", ".join(
                f"{name} {took:.0f} s" for name, took in seconds.items()
            )
    yield from _warnings(results)


def _warnings(results: ShapeResults) -> Iterator[str]:
    for (label, case), runs in results.runs.items():
        shares = [run["resident_share_before"] for run in runs if not is_as_asked(case, run)]
        if shares:
            told = ", ".join(f"{share:.1%}" for share in shares)
            yield f"{label}, {case.name}: not as {'cold' if case.is_cold else 'warm'} as asked, {told} was in memory"
    for label, reason in results.left_out.items():
        yield f"{label} is left out: {reason}"


def bars_of(all_results: Sequence[ShapeResults]) -> Mapping[str, list[tuple[str, float]]]:
    """Return what a plot shows: for each shape, the seconds until ready of every side and case."""
    bars: dict[str, list[tuple[str, float]]] = {}
    for results in all_results:
        for case in ORDER:
            for label in [label for label, measured in results.runs if measured == case]:
                found: dict[str, Any] = results.medians(label, case) or {}
                bars.setdefault(f"{results.name}: seconds until ready", []).append(
                    (f"{label}, {case.name}", found["ready_s"])
                )
    return bars
