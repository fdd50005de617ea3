"""What was measured of one model so far, by side and case. Knows figures, not how they are come by."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

Figures = Mapping[str, Any]


class Named(Protocol):
    """What a case is here: it can be a key, and has a name for people and for the JSON line."""

    @property
    def name(self) -> str:
        """How the case is called."""


C = TypeVar("C", bound=Named)


@dataclass
class Results(Generic[C]):
    """All that is known of one model so far; grows while measuring, so that an interrupted run loses nothing.

    `once` are the seconds that users of a side pay once, `left_out` the reasons why a side is missing, by label.
    """

    name: str
    once: dict[str, Mapping[str, float]] = field(default_factory=dict, kw_only=True)
    left_out: dict[str, str] = field(default_factory=dict, kw_only=True)
    runs: dict[tuple[str, C], list[Figures]] = field(default_factory=dict, kw_only=True)

    def add(self, label: str, case: C, figures: Figures) -> None:
        """Keep one run."""
        self.runs.setdefault((label, case), []).append(figures)

    def medians(self, label: str, case: C) -> dict[str, Any] | None:
        """Return the median of every figure of a case, or None where it was not measured."""
        runs = self.runs.get((label, case))
        return medians(runs) if runs else None

    def labels(self, case: C | None = None) -> list[str]:
        """Return the sides that have figures, of one case or of any, in the order in which they came."""
        return list(dict.fromkeys(label for label, measured in self.runs if case in (None, measured)))

    def told(self) -> dict[str, Any]:
        """Return everything as plain values, for the JSON line."""
        cases = [
            {"side": label, "case": case.name, "medians": medians(runs), "runs": runs}
            for (label, case), runs in self.runs.items()
        ]
        return {"shape": self.name, "once_s": self.once, "left_out": self.left_out, "cases": cases}


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
