"""The sides of `benchmarks.quality`, and how their scores are told: beside the reference's, and beside the peer's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from loadstone.units import format_size

from .quality_scores import Score, mean, ratio

OURS, PEER = "benchmarks.measure_quality", "benchmarks.measure_quality_transformers"
BAR = 1.005  # how many times the peer's perplexity ours may be
TOGETHER = "together"
HEADINGS = (
    "read a token", "perplexity", "times none", "times 4bit", "times bitsandbytes", "divergence", "same token",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One way to keep and multiply weights: the module that measures it, and what its process is told."""

    label: str
    module: str
    task: Mapping[str, str | None] = field(hash=False)


def _loadstone(label: str, strategy: str, embedding: str | None = None, lm_head: str | None = None) -> Side:
    return Side(label, OURS, {"strategy": strategy, "embedding": embedding, "lm_head": lm_head})


REFERENCE = _loadstone("none (reference)", "none")
DEFAULT = _loadstone("4bit", "4bit")
INTEGERS = _loadstone("int4", "int4")
PEERS = (
    Side("bitsandbytes NF4, bfloat16", PEER, {"dtype": "bfloat16"}),
    Side("bitsandbytes NF4, float32", PEER, {"dtype": "float32"}),
)
SIDES = (
    REFERENCE,
    _loadstone("8bit", "8bit"),
    DEFAULT,
    _loadstone("4bit, embedding and head floats", "4bit", "none", "none"),
    _loadstone("4bit, embedding 8 bits, head NF4", "4bit", "8bit", "4bit"),
    _loadstone("4bit, embedding and head NF4", "4bit", "4bit", "4bit"),
    INTEGERS,
    _loadstone("int4, embedding and head floats", "int4", "none", "none"),
    _loadstone("int4, embedding 8 bits, head integers", "int4", "8bit", "4bit"),
    _loadstone("int4, embedding and head integers", "int4", "4bit", "4bit"),
    *PEERS,
)


@dataclass(frozen=True)
class Result:
    """What one side came to: bytes of weights that a token reads, and the windows' scores by the text's name."""

    bytes_read_per_token: int
    scores: Mapping[str, Sequence[Score]]

    def of(self, text: str) -> Sequence[Score]:
        """Return the scores of one text, or of all `TOGETHER`."""
        return [one for scores in self.scores.values() for one in scores] if text == TOGETHER else self.scores[text]


Results = Mapping[Side, Result]


def texts_in(results: Results) -> list[str]:
    """Return the names of the texts, and all of them together where there is more than one."""
    names = list(results[REFERENCE].scores)
    return names if len(names) == 1 else [*names, TOGETHER]


def peer_of(results: Results, text: str) -> Side | None:
    """Return the peer whose perplexity on a text is the lower, or None where none was measured."""
    found = [side for side in PEERS if side in results]
    return min(found, key=lambda side: mean(results[side].of(text))["perplexity"], default=None)


def is_within_bar(results: Results, side: Side = DEFAULT) -> bool | None:
    """Tell whether a side is nowhere worse than the better peer by more than the bar; None without a peer."""
    found = []
    for text in texts_in(results):
        peer = peer_of(results, text)
        if peer is None:
            return None
        found.append(ratio(results[side].of(text), results[peer].of(text))[0] <= BAR)
    return all(found)


def _measures(results: Results, side: Side, text: str) -> dict[str, Any]:
    """Return one side's figures on a text; ratios are (times, standard error)."""
    scores, peer = results[side].of(text), peer_of(results, text)
    return {
        **mean(scores),
        "times_reference": ratio(scores, results[REFERENCE].of(text)),
        "times_4bit": ratio(scores, results[DEFAULT].of(text)),
        "times_peer": None if peer is None else ratio(scores, results[peer].of(text)),
    }


def table_of(title: str, results: Results) -> Table:
    """Return the table for people: a section for each text, a row for each side."""
    table = Table(title=title, title_justify="left")
    table.add_column("weights", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for text in texts_in(results):
        table.add_section()
        table.add_row(f"{text}, {sum(one.predictions for one in results[REFERENCE].of(text))} tokens", style="bold")
        for side in results:
            found = _measures(results, side, text)
            table.add_row(
                f"  {side.label}", format_size(results[side].bytes_read_per_token), f"{found['perplexity']:.3f}",
                _times(found["times_reference"]), _times(found["times_4bit"]), _times(found["times_peer"]),
                f"{found['divergence']:.4f}", f"{found['agreement']:.2%}",
            )  # fmt: skip
    return table


def _times(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return ""
    times, error = found
    return f"{times:.4f}" if error is None else f"{times:.4f} ± {error:.4f}"


def notes_of(results: Results, left_out: Mapping[str, str]) -> Iterator[str]:
    """Yield what stands below the table."""
    yield "± is one standard error, of the windows' differences; divergence is from none's distribution, in nats"
    for text in texts_in(results):
        peer = peer_of(results, text)
        if peer is not None:
            yield f"{text}: times bitsandbytes is beside {peer.label}, the better of the two"
    for side in (DEFAULT, INTEGERS):
        verdict = is_within_bar(results, side)
        if verdict is not None:
            found = "within" if verdict else "NOT within"
            yield f"{side.label} is {found} {BAR} times bitsandbytes' perplexity on every text"
    for label, reason in left_out.items():
        yield f"{label} is left out: {reason}"


def told(results: Results) -> list[dict[str, Any]]:
    """Return every side's figures as plain values."""
    return [
        {
            "label": side.label,
            **side.task,
            "bytes_read_per_token": result.bytes_read_per_token,
            "texts": {text: _measures(results, side, text) for text in texts_in(results)},
        }
        for side, result in results.items()
    ]
