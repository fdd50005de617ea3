"""Tells people what `benchmarks.decode` measured: tables, the notes below them, and the points of a roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .checkpoints import Shape
from .decode_cases import CASES, TEXT_CASES, Case
from .plot_roofline import Point
from .results import Figures, Results
from .stream_notes import accepted_share, once_and_missing
from .weights import operations

PREFILL, DECODE = "prefill_tokens_per_s", "decode_tokens_per_s"


@dataclass(frozen=True)
class Column:
    """One figure of one case: its heading, how it is written, and how it is found among the medians."""

    case: Case
    heading: str
    form: str
    figure: str | Callable[[Figures], float | None]

    def cell(self, results: Results[Case], label: str) -> str:
        """Return what stands in a side's row, which is nothing where it was not measured."""
        found = results.medians(label, self.case)
        if found is None:
            return ""
        value = found.get(self.figure) if isinstance(self.figure, str) else self.figure(found)
        return "" if value is None else self.form.format(value)


COLUMNS = (
    *(Column(CASES[name], f"prefill {name}, tok/s", "{:.0f}", PREFILL) for name in ("40", "480", "4000")),
    *(Column(CASES[name], f"decode at {name}, tok/s", "{:.1f}", DECODE) for name in ("40", "4000")),
    Column(CASES["40"], "guesses right", "{:.0%}", accepted_share),
    Column(CASES["prefix"], "first token of 1030", "{:.2f} s", "first_token_s"),
    Column(CASES["prefix"], "again, 1000 known", "{:.3f} s", "again_first_token_s"),
    Column(CASES["prefix"], "found in cache", "{:.0f}", "cached_tokens"),
)
TEXT_COLUMNS = tuple(
    column
    for name, case in TEXT_CASES.items()
    for column in (
        Column(case, f"{name}, tok/s", "{:.1f}", DECODE),
        Column(case, f"{name}: guessed tokens", "{:.0f}", "drafted_tokens"),
        Column(case, f"{name}: guesses right", "{:.0%}", accepted_share),
    )
)


def table_of(results: Results[Case]) -> Table:
    """Return a shape's table: a row for each side."""
    return _table(f"{results.name}: one stream", results, COLUMNS)


def text_table_of(results: Results[Case]) -> Table:
    """Return the table of a model that knows language."""
    return _table(f"{results.name}: text that quotes its prompt, and text that does not", results, TEXT_COLUMNS)


def _table(title: str, results: Results[Case], columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("side", no_wrap=True)
    table.add_column("runs", justify="right")
    labels = results.labels()
    shown = [column for column in columns if any(column.cell(results, label) for label in labels)]
    for column in shown:
        table.add_column(column.heading, justify="right")
    for label in labels:
        runs = max(len(runs) for (side, _), runs in results.runs.items() if side == label)
        table.add_row(label, str(runs), *(column.cell(results, label) for column in shown))
    return table


def notes_of(results: Results[Case], shape: Shape, ceilings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what stands below a shape's table: how near each side came to what the device can do."""
    if ceilings:
        yield f"{ceilings['device']} at most: " + ", ".join(
            f"{name} {ceilings[key] / 1e9:.0f} {unit}" if ceilings[key] else f"{name} not known"
            for key, name, unit in (
                ("read_bytes_per_s", "memory is read at", "GB/s"),
                ("bf16_operations_per_s", "bf16 products", "billion operations/s"),
                ("int8_operations_per_s", "int8 products", "billion operations/s"),
            )
        )
    for label in results.labels(CASES["40"]):
        found = results.medians(label, CASES["40"]) or {}
        if ceilings and found["read_per_token_bytes"] and not found["drafted_tokens"]:
            read = found["read_per_token_bytes"] * found[DECODE]
            yield f"{label} decodes with {read / 1e9:.1f} GB/s of weights, {read / ceilings['read_bytes_per_s']:.0%}"
    for label in results.labels(CASES["480"]):
        found = results.medians(label, CASES["480"]) or {}
        rate = operations(shape, int(found["prompt_tokens"])) / found["first_token_s"]
        yield f"{label} reads 480 tokens with {rate / 1e9:.0f} billion operations/s"
    yield from once_and_missing(results)


def text_notes_of(results: Results[Case]) -> Iterator[str]:
    """Yield what stands below the table of real text: whether the features changed what was said."""
    for case in TEXT_CASES.values():
        labels = results.labels(case)
        said = [results.runs[label, case][0]["texts"] for label in labels]
        if len(said) > 1:
            same = all(len({*texts}) == 1 for texts in zip(*said, strict=False))
            yield f"{case.name}: " + ("the same answers from both" if same else "the answers are not the same")
    yield from once_and_missing(results)


def points_of(results: Results[Case], shape: Shape) -> list[Point]:
    """Return where a shape's measured cases lie in a roofline.

    A prompt counts as read in one pass over the weights, a decoded token as one pass. Where tokens were guessed a pass
    makes more than one, and decoding is left out.
    """
    points: list[Point] = []
    for label, case in results.runs:
        found = results.medians(label, case) or {}
        read = found.get("read_per_token_bytes")
        if not read or case.shared_tokens:
            continue
        work = operations(shape, int(found["prompt_tokens"]))
        points.append(Point(f"{label}, prefill {case.prompt_tokens}", work / read, work / found["first_token_s"]))
        if found[DECODE] and not found["drafted_tokens"]:
            one = operations(shape, 1)
            points.append(Point(f"{label}, decode at {case.prompt_tokens}", one / read, one * found[DECODE]))
    return sorted(points, key=lambda point: point.label)
