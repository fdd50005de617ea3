"""What a plan says that a model will take, beside what it takes: loads of several shapes, strategies and contexts.

    python -m benchmarks.memory [--shapes smollm2,qwen2.5-0.5b] [--peers accelerate] [--folder build/load]

Every load is a fresh process, which then fills every stream's context; so is every peer's. Plans learn from the loads
before them in the run. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loadstone.planner.accuracy import NAME

from .checkpoints import write_checkpoint
from .job import is_whole
from .memory_cases import ANSWER_TOKENS, BUNDLED, MEMORY_SHAPES, Case, cases_of, prompt_tokens
from .memory_peers import PEERS, Peer
from .memory_report import Taken, is_kept, table_of
from .options import new_parser
from .prepared import plain_environment
from .processes import ModuleFailed, run_module
from .turns import exit_code_of

MODULE = "benchmarks.measure_memory"
TABLE_WIDTH = 180  # where the screen does not say how wide it is


def checkpoint_of(model: str, folder: Path, tokenizer: Path | None, report: Console) -> str:
    """Return what a model is loaded from, its checkpoint made unless it is there."""
    if model == BUNDLED:
        return model
    shape, checkpoint = MEMORY_SHAPES[model], folder / model
    if not is_whole(checkpoint, shape):
        report.print(f"{model}: writing the checkpoint …", style="dim")
        write_checkpoint(shape, checkpoint, tokenizer=tokenizer)
    return str(checkpoint)


def measure_case(case: Case, checkpoint: str, home: Path, max_memory: str | None) -> dict[str, Any]:
    """Load one case in a fresh process and return what it found."""
    if case.is_first:
        shutil.rmtree(home / "cache" / "store", ignore_errors=True)
    wish = {"base_model": checkpoint, "quantization": case.strategy, "context": case.context, "streams": case.streams}
    if max_memory is not None:
        wish["max_memory"] = max_memory
    sizes = {"streams": case.streams, "prompt_tokens": prompt_tokens(case), "tokens": ANSWER_TOKENS}
    task = {"config": {"model_config": wish}, **sizes}
    return run_module(MODULE, json.dumps(task), environment=plain_environment(home))


def forget_loads(home: Path) -> None:
    """Begin without earlier loads to learn from, as on a machine that has seen none."""
    (home / "cache" / NAME).unlink(missing_ok=True)


class Measuring:
    """One run in the making: what was found of each load and of each peer, and what failed."""

    def __init__(self, report: Console) -> None:
        self.loads: list[tuple[Case, dict[str, Any]]] = []
        self.peers: list[Taken] = []
        self.failures: dict[str, str] = {}
        self.lost = 0  # loads of ours that failed
        self._report = report

    def measure_loads(self, model: str, checkpoint: str, home: Path, repetitions: int, max_memory: str | None) -> None:
        """Measure every case of one model."""
        for case in [case for case in cases_of(model) for _ in range(repetitions)]:
            self._report.print(f"{case.name} …", style="dim")
            try:
                self.loads.append((case, measure_case(case, checkpoint, home, max_memory)))
            except ModuleFailed as failure:
                self.lost += 1
                self._failed(case.name, failure)
        shutil.rmtree(home / "cache" / "store", ignore_errors=True)

    def measure_peer(self, peer: Peer) -> None:
        """Measure a peer in the same cases; a load from the store is none of its own."""
        try:
            peer.prepare()
        except ModuleFailed as failure:
            self._failed(peer.label, failure)
            return
        for case in cases_of(peer.model):
            if not case.is_first:
                continue
            name = f"{peer.label}: {case.wish}"
            self._report.print(f"{name} …", style="dim")
            try:
                size = peer.bytes_of(case)
            except ModuleFailed as failure:
                self._failed(name, failure)
                continue
            if size is not None:
                self.peers.append(Taken(peer.label, case.wish, size))

    def _failed(self, name: str, failure: ModuleFailed) -> None:
        self.failures[name] = str(failure)
        self._report.print(str(failure), style="red", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line; return 0 when every promise was kept, else 1, or 130 after Ctrl-C."""
    about = __doc__.splitlines()[0]
    parser = new_parser(
        "memory", about, shapes=(BUNDLED, *MEMORY_SHAPES), peers=tuple(PEERS), repetitions=1, unit="each load"
    )  # fmt: skip
    said = parser.parse_args(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    found = Measuring(report)

    home = said.folder / "memory-home"
    forget_loads(home)

    def measure() -> None:
        for model in said.shapes:
            checkpoint = checkpoint_of(model, said.folder, said.tokenizer, report)
            found.measure_loads(model, checkpoint, home, said.repetitions, said.max_memory)
            for name in said.peers:
                found.measure_peer(PEERS[name](model, checkpoint, said.folder))

    code = exit_code_of(measure, report)
    screen.print(table_of(found.loads, found.peers))
    loads = [{"case": case.name, **one} for case, one in found.loads]
    peers = [vars(one) for one in found.peers]
    print(json.dumps({"benchmark": "memory", "loads": loads, "peers": peers, "failures": found.failures}))
    return code or int(found.lost > 0 or not all(is_kept(one) for _, one in found.loads))


if __name__ == "__main__":
    sys.exit(main())
