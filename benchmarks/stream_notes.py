"""What the reports of `benchmarks.decode` and `benchmarks.batch` have in common."""

from __future__ import annotations

from collections.abc import Iterator

from .results import C, Figures, Results


def accepted_share(figures: Figures) -> float | None:
    """Return the share of guessed tokens that were right, or None where none was guessed."""
    drafted, accepted = figures.get("drafted_tokens"), figures.get("accepted_tokens")
    return accepted / drafted if drafted and accepted is not None else None


def once_and_missing(results: Results[C]) -> Iterator[str]:
    """Yield what users pay once, and which sides are missing for which reason."""
    for label, seconds in results.once.items():
        if seconds:
            steps = ", ".join(f"{name} {took:.0f} s" for name, took in seconds.items())
            yield f"{label}, once before the first load: {steps}"
    for label, reason in results.left_out.items():
        yield f"{label} is left out: {reason}"
