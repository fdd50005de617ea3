"""Many streams, measured: what a model answers in all when several ask it at the same time.

    python -m benchmarks.batch [--shapes qwen2.5-0.5b] [--streams 1,4,8,32] [--folder build/load]

Makes what it needs in the folder and keeps it there. Every measurement is a fresh process; the sides take turns. Prints
a table for each shape, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from .batch_report import Case, notes_of, table_of
from .checkpoints import SHAPES
from .job import PROMPT_TOKENS, job_of
from .options import add_device, device_of, new_parser, one_or_more
from .processes import run_module
from .prompts import different_prompts
from .results import Results
from .stream_sides import Loadstone, Side, batch_sides
from .turns import exit_code_of, take_turns

MODULE = "benchmarks.measure_batch"
PEERS = ("transformers", "llamacpp", "vllm")
STREAMS = "1,4,8,32"
TOKENS = 64  # of each answer
ROUNDS = 3  # of one process, each with prompts of its own
CONTEXT_STEP = 256  # a stream's context is a multiple of it
TABLE_WIDTH = 160  # where the screen does not say how wide it is


def measure_case(side: Side, case: Case, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Ask one side so many prompts at once in a fresh process, and return the figures."""
    needed = 2 * PROMPT_TOKENS + tokens  # tokenizers agree roughly
    streams = case.streams
    task = {
        "kind": side.kind,
        "settings": side.settings(-(-needed // CONTEXT_STEP) * CONTEXT_STEP, streams),
        "rounds": [prompts[number * streams : (number + 1) * streams] for number in range(ROUNDS)],
        "tokens": tokens,
    }
    return run_module(MODULE, json.dumps(task), environment=side.environment(), python=side.python)


def measure_shape(
    results: Results[Case], sides: Sequence[Side], said: argparse.Namespace, report: Console
) -> None:  # fmt: skip
    """Measure all sides with every number of streams."""
    tokenizer = Tokenizer.from_file(str(sides[0].job.checkpoint / "tokenizer.json"))
    cases = [Case(streams) for streams in said.streams]
    number = ROUNDS * max(said.streams)
    prompts = different_prompts(number, PROMPT_TOKENS, lambda text: list(tokenizer.encode(text).ids))

    def wanted(side: Side, case: Case) -> int:
        return int(said.repetitions if isinstance(side, Loadstone) else said.peer_repetitions)

    def measure(side: Side, case: Case) -> dict[str, Any]:
        return measure_case(side, case, prompts, said.tokens)

    take_turns(results, sides, cases, report, wanted=wanted, measure=measure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    about = __doc__.splitlines()[0]
    parser = new_parser("batch", about, shapes=SHAPES, peers=PEERS, repetitions=2, unit="each number of streams")
    parser.add_argument("--streams", type=_numbers, default=STREAMS, help=f"default {STREAMS}")
    parser.add_argument("--tokens", type=_two_or_more, default=TOKENS, help=f"of each answer; default {TOKENS}")
    add_device(parser)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [one_or_more(part) for part in text.split(",")]


def _two_or_more(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError("an answer of one token has nothing to decode")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the JSON line, and return the exit code: 0, 1 for a failure, 130 after Ctrl-C.

    Whatever ends the measuring, what was measured is told.
    """
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    everything: list[Results[Case]] = []
    machine: dict[str, Any] = {}

    def measure() -> None:
        machine.update(run_module("benchmarks.machine"))
        device = device_of(said, machine)
        for name in said.shapes:
            job = job_of(name, SHAPES[name], said, int(machine["cores"]), report, device=device)
            everything.append(Results(name))
            measure_shape(everything[-1], batch_sides(job, said.peers, said.vllm), said, report)

    code = exit_code_of(measure, report)
    for results in everything:
        screen.print(table_of(results))
        for note in notes_of(results):
            screen.print(note, style="dim", highlight=False, soft_wrap=True, markup=False)
    print(json.dumps({"benchmark": "batch", "machine": machine, "shapes": [one.told() for one in everything]}))
    return code or int(any(Loadstone.name in results.left_out for results in everything))


if __name__ == "__main__":
    sys.exit(main())
