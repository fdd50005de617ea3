"""A load, measured: first and later, with a cold and a warm page cache, beside the peers that are installed.

    python -m benchmarks.load [--shapes qwen2.5-0.5b] [--folder build/load] [--repetitions 3] [--plot FILE.svg]

Makes what it needs (checkpoints, GGUF files) in the folder and keeps it there for the next run. Every load is a fresh
process; the sides take turns. Prints a table for each shape, then one JSON line. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .checkpoints import SHAPES
from .job import job_of
from .load_figures import ShapeResults, measure_case
from .load_report import bars_of, notes_of, table_of
from .load_sides import CASES, Case, Loadstone, Side, sides_of
from .options import new_parser
from .plot import bars_svg
from .processes import run_module
from .turns import exit_code_of, take_turns

PEERS = ("transformers", "llamacpp")
TABLE_WIDTH = 160  # where the screen does not say how wide it is


def measure_shape(results: ShapeResults, sides: Sequence[Side], said: argparse.Namespace, report: Console) -> None:
    """Measure all cases of all sides, which take turns; what fails is left out from then on."""

    def wanted(side: Side, case: Case) -> int:
        if case.kind not in side.kinds:
            return 0
        return int(said.repetitions if isinstance(side, Loadstone) else said.peer_repetitions)

    take_turns(results, sides, CASES, report, wanted=wanted, measure=measure_case)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    about = __doc__.splitlines()[0]
    parser = new_parser("load", about, shapes=SHAPES, peers=PEERS, repetitions=3, unit="each case")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the seconds until ready")
    said = parser.parse_args(arguments)
    if not hasattr(os, "posix_fadvise") or not sys.platform.startswith("linux"):
        parser.error("the page cache can be emptied and looked at on Linux only")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the JSON line, and return the exit code: 0, 1 for a failure, 130 after Ctrl-C.

    Whatever ends the measuring, what was measured is told.
    """
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    everything: list[ShapeResults] = []
    machine: dict[str, object] = {}

    def measure() -> None:
        machine.update(run_module("benchmarks.machine"))
        for name in said.shapes:
            job = job_of(name, SHAPES[name], said, int(str(machine["cores"])), report)
            everything.append(ShapeResults(name, sum(file.stat().st_size for file in job.weights())))
            measure_shape(everything[-1], sides_of(job, said.peers), said, report)

    code = exit_code_of(measure, report)
    _tell(everything, machine, said, screen)
    return code or int(any(Loadstone.label in results.left_out for results in everything))


def _tell(
    everything: Sequence[ShapeResults], machine: dict[str, object], said: argparse.Namespace, screen: Console
) -> None:  # fmt: skip
    for results in everything:
        screen.print(table_of(results))
        for note in notes_of(results):
            screen.print(note, style="dim", highlight=False, soft_wrap=True, markup=False)
    if said.plot is not None:
        said.plot.write_text(bars_svg(bars_of(everything), highlight=Loadstone.label), encoding="utf-8")
    print(json.dumps({"benchmark": "load", "machine": machine, "shapes": [one.told() for one in everything]}))


if __name__ == "__main__":
    sys.exit(main())
