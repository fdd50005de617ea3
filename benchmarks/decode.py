"""One stream, measured: reading prompts, decoding, a prefix that is known, and text that quotes its prompt.

    python -m benchmarks.decode [--shapes qwen2.5-0.5b] [--cases 40,480] [--folder build/load] [--plot FILE.svg]

Makes what it needs in the folder and keeps it there. Every measurement is a fresh process; the sides take turns. Prints
a table for each shape and one for real text, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoints import SHAPES
from .decode_cases import CASES, TEXT_CASES, Asked, Case, asked_of, asked_of_text
from .decode_report import notes_of, points_of, table_of, text_notes_of, text_table_of
from .job import Job, job_of
from .options import add_device, device_of, names_among, new_parser
from .plot_roofline import roofline_svg
from .processes import run_module
from .results import Results
from .stream_sides import Loadstone, Side, decode_sides, loadstone_sides
from .turns import exit_code_of, take_turns

MODULE = "benchmarks.measure_decode"
PEERS = ("transformers", "llamacpp", "openvino")
TEXT_MODEL = "smollm2"
TABLE_WIDTH = 160  # where the screen does not say how wide it is


def measure_case(side: Side, case: Case, asked: Asked) -> dict[str, Any]:
    """Ask one case of one side in a fresh process, and return the figures."""
    task = {
        "kind": side.kind,
        "settings": {**side.settings(asked.context, 1), "is_chat": asked.is_chat},
        "warm_up": side.job.prompt,
        "prompts": asked.prompts,
        "tokens": case.tokens,
        "has_one_beginning": case.shared_tokens > 0,
        "are_new": not asked.is_chat,
    }
    figures = run_module(MODULE, json.dumps(task), environment=side.environment(), python=side.python)
    if figures["read_per_token_bytes"] is None:
        figures["read_per_token_bytes"] = side.read_per_token()
    return figures


def measure_shape(
    results: Results[Case], sides: Sequence[Side], cases: Sequence[Case], said: argparse.Namespace, report: Console
) -> None:  # fmt: skip
    """Measure the cases of all sides on random weights."""
    job = sides[0].job
    asked = {case: asked_of(case, job.checkpoint / "tokenizer.json", job.prompt) for case in cases}
    _measure(results, sides, asked, said, report)


def measure_text(
    results: Results[Case], cases: Sequence[Case], said: argparse.Namespace, job: Job, report: Console
) -> None:
    """Measure Loadstone on a model that knows language, with and without its features."""
    _measure(results, loadstone_sides(job), {case: asked_of_text(case) for case in cases}, said, report)


def _measure(
    results: Results[Case], sides: Sequence[Side], asked: dict[Case, Asked], said: argparse.Namespace, report: Console
) -> None:  # fmt: skip
    def wanted(side: Side, case: Case) -> int:
        repetitions = said.repetitions if isinstance(side, Loadstone) else said.peer_repetitions
        return 1 if case.is_long else int(repetitions)

    def measure(side: Side, case: Case) -> dict[str, Any]:
        return measure_case(side, case, asked[case])

    take_turns(results, sides, list(asked), report, wanted=wanted, measure=measure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    about = __doc__.splitlines()[0]
    parser = new_parser("decode", about, shapes=SHAPES, peers=PEERS, repetitions=3, unit="each case")
    known = (*CASES, *TEXT_CASES)
    every = ",".join(known)
    parser.add_argument("--cases", type=names_among(known), default=every, help=f"default {every}")
    add_device(parser)
    parser.add_argument("--text-model", default=TEXT_MODEL, help=f"for grounded and free text; default {TEXT_MODEL}")
    parser.add_argument("--openvino", metavar="PYTHON", help="of an environment with openvino-genai and optimum-cli")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the roofline")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the JSON line, and return the exit code: 0, 1 for a failure, 130 after Ctrl-C.

    Whatever ends the measuring, what was measured is told.
    """
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    everything: list[Results[Case]] = []
    text: list[Results[Case]] = []
    machine: dict[str, Any] = {}
    cases = [CASES[name] for name in said.cases if name in CASES]
    text_cases = [TEXT_CASES[name] for name in said.cases if name in TEXT_CASES]

    def measure() -> None:
        machine.update(run_module("benchmarks.machine"))
        device = device_of(said, machine)
        machine["ceilings"] = run_module("benchmarks.ceilings", device)
        threads = int(machine["cores"])
        if text_cases:
            text.append(Results(said.text_model))
            job = Job(said.text_model, Path(said.text_model), said.folder, "A bond is", threads, device=device)
            measure_text(text[0], text_cases, said, job, report)
        for name in said.shapes if cases else ():
            job = job_of(name, SHAPES[name], said, threads, report, device=device)
            everything.append(Results(name))
            measure_shape(everything[-1], decode_sides(job, said.peers, said.openvino), cases, said, report)

    code = exit_code_of(measure, report)
    _tell(everything, text, machine, said, screen)
    return code or int(any(Loadstone.name in results.left_out for results in (*everything, *text)))


def _tell(
    everything: Sequence[Results[Case]], text: Sequence[Results[Case]], machine: dict[str, Any],
    said: argparse.Namespace, screen: Console,
) -> None:  # fmt: skip
    ceilings = machine.get("ceilings", {})
    told = [(table_of(one), notes_of(one, SHAPES[one.name], ceilings)) for one in everything]
    told += [(text_table_of(one), text_notes_of(one)) for one in text]
    for table, notes in told:
        screen.print(table)
        for note in notes:
            screen.print(note, style="dim", highlight=False, soft_wrap=True, markup=False)
    if said.plot is not None:
        groups = {one.name: points_of(one, SHAPES[one.name]) for one in everything}
        said.plot.write_text(roofline_svg(ceilings, groups, highlight=Loadstone.name), encoding="utf-8")
    line = {"benchmark": "decode", "machine": machine, "shapes": [one.told() for one in everything]}
    print(json.dumps({**line, "text": [one.told() for one in text]}))


if __name__ == "__main__":
    sys.exit(main())
