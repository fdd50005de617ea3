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
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from loadstone.checkpoint import inspect
from loadstone.errors import LoadstoneError
from loadstone.sources import resolve

from .checkpoints import SHAPES, Shape, write_checkpoint
from .disk import direct_read_rate
from .load_figures import ShapeResults, measure_case
from .load_report import bars_of, notes_of, table_of
from .load_sides import CASES, Job, Loadstone, Side, sides_of
from .plot import bars_svg
from .processes import ModuleFailed, run_module
from .prompts import prompt_of

PROMPT_TOKENS = 40
PEERS = ("transformers", "llamacpp")
TABLE_WIDTH = 160  # where the screen does not say how wide it is


def is_whole(folder: Path, shape: Shape) -> bool:
    """Tell whether a folder has a checkpoint of this shape, with every tensor, and a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        tensors = inspect(resolve(str(folder))).tensors
    except LoadstoneError:
        return False
    return {name: tensor.shape for name, tensor in tensors.items()} == dict(shape.tensors())


def job_of(name: str, said: argparse.Namespace, threads: int, report: Console) -> Job:
    """Return the job of one shape, its checkpoint made unless it is there."""
    from tokenizers import Tokenizer

    checkpoint = said.folder / name
    if not is_whole(checkpoint, SHAPES[name]):
        report.print(f"{name}: writing the checkpoint …", style="dim")
        write_checkpoint(SHAPES[name], checkpoint, tokenizer=said.tokenizer)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = prompt_of(PROMPT_TOKENS, lambda text: len(tokenizer.encode(text)))
    return Job(name, checkpoint, said.folder, prompt, threads, said.max_memory)


def measure_shape(results: ShapeResults, sides: Sequence[Side], said: argparse.Namespace, report: Console) -> None:
    """Measure all cases of all sides, which take turns; what fails is left out from then on."""
    with ExitStack() as ends:
        for side in sides:
            ends.callback(side.close)
            report.print(f"{results.name}, {side.label}: getting ready …", style="dim")
            try:
                results.once[side.label] = side.prepare()
            except (ModuleFailed, OSError) as failure:
                _leave_out(results, side, failure, report)
        for turn in range(max(said.repetitions, said.peer_repetitions)):
            _take_turn(results, sides, turn, said, report)


def _take_turn(
    results: ShapeResults, sides: Sequence[Side], turn: int, said: argparse.Namespace, report: Console
) -> None:  # fmt: skip
    for case in CASES:
        for side in sides:
            wanted = said.repetitions if isinstance(side, Loadstone) else said.peer_repetitions
            if turn >= wanted or case.kind not in side.kinds or side.label in results.left_out:
                continue
            report.print(f"{results.name}, {side.label}, {case.name}, {turn + 1} of {wanted} …", style="dim")
            try:
                results.add(side.label, case, measure_case(side, case))
            except (ModuleFailed, OSError) as failure:
                _leave_out(results, side, failure, report)


def _leave_out(results: ShapeResults, side: Side, failure: Exception, report: Console) -> None:
    report.print(f"{side.label} is left out: {failure}", style="red", markup=False)
    results.left_out[side.label] = str(failure).strip().splitlines()[-1]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"default {','.join(SHAPES)}")
    parser.add_argument("--folder", type=Path, default=Path("build/load"), help="for all files; default build/load")
    parser.add_argument("--repetitions", type=int, default=3, help="of each case of Loadstone; default 3")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"default {','.join(PEERS)}; '' for none")
    parser.add_argument("--peer-repetitions", type=int, default=1, help="of each case of the peers; default 1")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json, for checkpoints not there yet")
    parser.add_argument("--max-memory", help="of Loadstone, such as 20GB")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the seconds until ready")
    said = parser.parse_args(arguments)
    said.shapes, said.peers = ([part for part in text.split(",") if part] for text in (said.shapes, said.peers))
    if unknown := [name for name in said.shapes if name not in SHAPES] or [
        one for one in said.peers if one not in PEERS
    ]:
        parser.error(f"{unknown[0]!r} is neither of {', '.join(SHAPES)} nor of {', '.join(PEERS)}")
    if said.repetitions < 1 or said.peer_repetitions < 1:
        parser.error("repetitions must be 1 or more")
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
    code = 0
    try:
        machine.update(run_module("benchmarks.machine"))
        for name in said.shapes:
            job = job_of(name, said, int(str(machine["cores"])), report)
            weights = job.weights()
            total = sum(file.stat().st_size for file in weights)
            largest = max(weights, key=lambda file: file.stat().st_size)
            everything.append(ShapeResults(name, total, direct_read_rate(largest)))
            measure_shape(everything[-1], sides_of(job, said.peers), said, report)
    except KeyboardInterrupt:
        code = 130
    except (ModuleFailed, OSError) as failure:
        report.print(str(failure), style="red", markup=False)
        code = 1
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
