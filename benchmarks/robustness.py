"""What a store goes through: processes killed at random moments, started together, and many loads in a row.

    python -m benchmarks.robustness MODEL [--kills 100] [--rounds 50]

MODEL is a folder with safetensors. Every killed load is followed by one that must be right: the same greedy tokens, an
entry whose every byte is verified, and nothing half done left. Prints a table, then one JSON line; exits with 1 when
anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadstone import ModelManager
from loadstone.hardware import process_rss
from loadstone.store import Store
from loadstone.units import format_size

PROMPT, TOKENS = "A bond is", 4
FIRST_ROUND = 5  # the allocator has what it keeps by then


def manager_of(model: str, store: Path) -> ModelManager:
    """Return a manager of the model with a store of its own."""
    return ModelManager({
        "model_config": {"base_model": model, "context": 512}, "store": {"folder": str(store)},
        "generation": {"temperature": 0, "max_new_tokens": TOKENS, "repetition_penalty": 1.0},
    })  # fmt: skip


def answer(model: str, store: Path) -> str:
    """Load, answer and unload in this process; return the answer."""
    with manager_of(model, store) as manager:
        manager.load()
        return str(manager.generate(PROMPT, raw=True))


def start(model: str, store: Path) -> subprocess.Popen[str]:
    """Start a load in a process of its own, which prints its answer as JSON."""
    command = [sys.executable, "-m", "benchmarks.robustness", model, "--answer", str(store)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def is_clean(store: Store) -> bool:
    """Tell whether there is one entry, whole to the last byte, and nothing else."""
    entries = store.entries()
    left = [*(store.folder / "drafts").glob("*"), *store.damaged()]
    return len(entries) == 1 and store.verify(entries[0]) is None and not left


def kills(model: str, folder: Path, wanted: str, count: int, report: Console) -> dict[str, Any]:
    """Kill `count` first loads, each at a random moment of what a whole one takes, and load after each."""
    store = Store(folder)
    whole = 0.0
    for _ in range(2):  # the first one, of a machine, also compiles kernels
        _empty(store)
        begun = time.perf_counter()
        start(model, folder).wait()
        whole = time.perf_counter() - begun
    found: dict[str, Any] = {"kills": 0, "ended_before": 0, "left_a_draft": 0, "left_an_entry": 0, "wrong": 0}
    while found["kills"] < count:
        _empty(store)
        process = start(model, folder)
        try:
            process.wait(random.uniform(0, whole))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        found["kills" if process.wait() == -signal.SIGKILL else "ended_before"] += 1
        found["left_a_draft"] += any((folder / "drafts").glob("*"))
        found["left_an_entry"] += bool(store.entries())
        found["wrong"] += answer(model, folder) != wanted or not is_clean(store)
        if found["kills"] % 10 == 0:
            report.print(f"{count} loads are to be killed: {found}", style="dim")
    return found


def _empty(store: Store) -> None:
    for entry in store.entries():
        store.remove(entry)


def together(model: str, folder: Path, wanted: str, count: int) -> dict[str, Any]:
    """Start `count` processes at once with an empty store."""
    processes = [start(model, folder) for _ in range(count)]
    answers = [json.loads(process.communicate()[0]) for process in processes]
    right = sum(one == wanted for one in answers)
    return {"processes": count, "right": right, "wrong": count - right + (not is_clean(Store(folder)))}


def rounds(model: str, folder: Path, count: int) -> dict[str, Any]:
    """Load and unload `count` times; return the slope of resident memory in bytes a round, by least squares."""
    sizes = []
    for _ in range(count):
        answer(model, folder)
        sizes.append(process_rss())
    settled = sizes[FIRST_ROUND:]
    slope = statistics.linear_regression(range(len(settled)), settled).slope
    return {"rounds": count, "first_bytes": sizes[0], "last_bytes": sizes[-1], "slope_bytes": slope}


def measure(said: argparse.Namespace, report: Console) -> dict[str, Any]:
    """Return everything that was found."""
    with tempfile.TemporaryDirectory(prefix="robustness-", dir=said.folder) as place:
        wanted = answer(said.model, Path(place) / "reference")
        return {
            "kill -9": kills(said.model, Path(place) / "kills", wanted, said.kills, report),
            "two together": together(said.model, Path(place) / "two", wanted, 2),
            "four together": together(said.model, Path(place) / "four", wanted, 4),
            "rounds": rounds(said.model, Path(place) / "rounds", said.rounds),
        }


def table_of(model: str, found: dict[str, Any]) -> Table:
    """Return the table for people."""
    table = Table(title=f"{Path(model).name}: loads that are disturbed", title_justify="left")
    table.add_column("case")
    table.add_column("what happened")
    for case, facts in found.items():
        words = (
            f"{name.replace('_', ' ')} {format_size(int(value)) if name.endswith('bytes') and value >= 0 else value}"
            for name, value in facts.items()
        )
        table.add_row(case, ", ".join(words))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Disturb loads, print the table and the JSON line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder with safetensors")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="where stores are made; default: the system's temporary folder")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args(arguments)
    if said.answer is not None:
        print(json.dumps(answer(said.model, said.answer)))
        return 0
    found = measure(said, Console(stderr=True))
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(said.model, found))
    print(json.dumps({"benchmark": "robustness", "model": Path(said.model).name, **found}))
    return int(any(facts.get("wrong") for facts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
