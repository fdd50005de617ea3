"""Tells people what `benchmarks.batch` measured: one table a shape, and the notes below it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from .results import Results
from .stream_notes import accepted_share, once_and_missing


@dataclass(frozen=True)
class Case:
    """So many streams at the same time."""

    streams: int

    @property
    def name(self) -> str:
        """For tables, and as a key: "8 streams"."""
        return "1 stream" if self.streams == 1 else f"{self.streams} streams"


# key among the medians, heading, how a value is written
COLUMNS = (
    ("decode_tokens_per_s", "decode, tok/s", "{:.1f}"),
    ("times", "times one stream", "{:.2f}"),
    ("answer_tokens_per_s", "answers, tok/s", "{:.1f}"),
    ("all_tokens_per_s", "with prompts, tok/s", "{:.1f}"),
    ("first_token_s", "first token, median", "{:.2f} s"),
    ("worst_first_token_s", "worst", "{:.2f} s"),
    ("accepted_share", "guesses right", "{:.0%}"),
)


def table_of(results: Results[Case]) -> Table:
    """Return a shape's table: a section for each number of streams, a row for each side."""
    table = Table(title=f"{results.name}: many streams", title_justify="left")
    table.add_column("side", no_wrap=True)
    table.add_column("runs", justify="right")
    shown = [column for column in COLUMNS if any(_cell(results, *at, column) for at in results.runs)]
    for _, heading, _ in shown:
        table.add_column(heading, justify="right")
    for case in dict.fromkeys(case for _, case in results.runs):
        table.add_section()
        table.add_row(case.name, style="bold")
        for label in results.labels(case):
            cells = [_cell(results, label, case, column) for column in shown]
            table.add_row(f"  {label}", str(len(results.runs[label, case])), *cells)
    return table


def _cell(results: Results[Case], label: str, case: Case, column: tuple[str, str, str]) -> str:
    """Return what stands in a column of a side's row, which is nothing where it is not known."""
    key, _, form = column
    found = results.medians(label, case) or {}
    more = {"times": times_one_stream(results, label, case), "accepted_share": accepted_share(found)}
    value = {**found, **more}.get(key)
    return "" if value is None else form.format(value)


def times_one_stream(results: Results[Case], label: str, case: Case) -> float | None:
    """Return how many times as fast as one stream so many decode together, or None where one was not measured."""
    one, many = (
        (results.medians(label, at) or {}).get("decode_tokens_per_s") for at in (Case(1), case)
    )  # fmt: skip
    return many / one if one and many else None


def notes_of(results: Results[Case]) -> Iterator[str]:
    """Yield what stands below a shape's table."""
    for (label, case), runs in results.runs.items():
        if any(run["decode_tokens_per_s"] is None for run in runs):
            yield f"{label}, {case.name}: whole answers took no longer than first tokens; ask for more tokens"
    yield from once_and_missing(results)
