"""Lets the sides of a benchmark take turns, and keeps what was measured whatever ends it.

Knows neither what a side is nor what is measured. A slow minute of the machine is then everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, TypeVar

from rich.console import Console

from .processes import ModuleFailed
from .results import C, Figures, Results


class Side(Protocol):
    """One way to run the model."""

    label: str

    def prepare(self) -> Mapping[str, float]:
        """Make what measuring needs; return the seconds of what users pay once."""

    def close(self) -> None:
        """Remove what only this run needs."""


S = TypeVar("S", bound=Side)


def take_turns(
    results: Results[C], sides: Sequence[S], cases: Sequence[C], report: Console, *,
    wanted: Callable[[S, C], int], measure: Callable[[S, C], Figures],
) -> None:  # fmt: skip
    """Measure every case of every side as often as `wanted` says; what fails is left out from then on."""
    with ExitStack() as ends:
        for side in sides:
            ends.callback(side.close)
            report.print(f"{results.name}, {side.label}: getting ready …", style="dim")
            try:
                results.once[side.label] = side.prepare()
            except (ModuleFailed, OSError) as failure:
                _leave_out(results, side, failure, report)
        for turn in range(max((wanted(side, case) for side in sides for case in cases), default=0)):
            for case in cases:
                for side in sides:
                    if turn >= wanted(side, case) or side.label in results.left_out:
                        continue
                    told = f"{results.name}, {side.label}, {case.name}, {turn + 1} of {wanted(side, case)} …"
                    report.print(told, style="dim")
                    try:
                        results.add(side.label, case, measure(side, case))
                    except (ModuleFailed, OSError) as failure:
                        _leave_out(results, side, failure, report)


def _leave_out(results: Results[C], side: Side, failure: Exception, report: Console) -> None:
    report.print(f"{side.label} is left out: {failure}", style="red", markup=False)
    results.left_out[side.label] = str(failure).strip().splitlines()[-1]


def exit_code_of(measuring: Callable[[], None], report: Console) -> int:
    """Measure, and return 0, 1 for a failure that is told, or 130 after Ctrl-C."""
    try:
        measuring()
    except KeyboardInterrupt:
        return 130
    except (ModuleFailed, OSError) as failure:
        report.print(str(failure), style="red", markup=False)
        return 1
    return 0
