"""The main job, measured: load a model in 4 bits and answer, beside transformers + bitsandbytes in the same run.

    python -m benchmarks.main_job MODEL [--peer] [--tokens 32] [--repetitions 3]

Every measurement is a fresh process; the two sides take turns, so that a slow minute of the machine is both's.
Prints a table of medians, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadstone.units import format_size

from .processes import ModuleFailed, run_module

OURS, PEER = "benchmarks.measure_loadstone", "benchmarks.measure_transformers"
SHORT_PROMPT, LONG_PROMPT = 40, 480

# key in a side's measurements, label, how a value is written, whether more is better
MEASURES = (
    ("load_s", "load, imports included", "{:.2f} s", False),
    ("first_token_s", f"first token, {SHORT_PROMPT}-token prompt", "{:.2f} s", False),
    ("decode_tokens_per_s", "decode, batch 1", "{:.1f} tok/s", True),
    ("prefill_tokens_per_s", f"prefill, {LONG_PROMPT} tokens", "{:.0f} tok/s", True),
    ("peak_rss_bytes", "peak RSS", "size", False),
    ("steady_rss_bytes", "steady RSS", "size", False),
)
Run = Mapping[str, Any]


def measure(said: argparse.Namespace, threads: int, report: Console) -> tuple[list[Run], list[Run]]:
    """Return the runs of both sides, which take turns."""
    task = {
        "model": said.model,
        "device": said.device,
        "quantization": said.quantization,
        "max_memory": said.max_memory,
        "tokens": said.tokens,
        "threads": threads,
        "short_prompt": SHORT_PROMPT,
        "long_prompt": LONG_PROMPT,
    }
    peer_runs = 0 if not said.peer else said.peer_repetitions or said.repetitions
    ours: list[Run] = []
    peer: list[Run] = []
    for turn in range(max(said.repetitions, peer_runs)):
        for runs, wanted, module in ((ours, said.repetitions, OURS), (peer, peer_runs, PEER)):
            if turn < wanted:
                report.print(f"{module}, {turn + 1} of {wanted} …", style="dim")
                runs.append(run_module(module, json.dumps(task)))
    return ours, peer


def medians(runs: Sequence[Run]) -> dict[str, float]:
    """Return the median of each measure."""
    return {key: statistics.median(run[key] for run in runs) for key, *_ in MEASURES}


def ratios(ours: Mapping[str, float], peer: Mapping[str, float]) -> dict[str, float]:
    """Return how many times better ours is, measure by measure: above 1 is better, whatever is measured."""
    return {key: ours[key] / peer[key] if is_more else peer[key] / ours[key] for key, _, _, is_more in MEASURES}


def table_of(title: str, ours: Sequence[Run], peer: Sequence[Run]) -> Table:
    """Return the table for people."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    table.add_column(f"Loadstone {ours[0]['strategy']} (median of {len(ours)})", justify="right")
    our_medians, peer_medians = medians(ours), medians(peer) if peer else None
    if peer:
        table.add_column(f"transformers + bitsandbytes NF4 (median of {len(peer)})", justify="right")
        table.add_column("times better", justify="right")
    for key, label, form, _ in MEASURES:
        cells = [label, _written(our_medians[key], form)]
        if peer_medians is not None:
            cells += [_written(peer_medians[key], form), f"{ratios(our_medians, peer_medians)[key]:.2f}"]
        table.add_row(*cells)
    return table


def _written(value: float, form: str) -> str:
    return format_size(int(value)) if form == "size" else form.format(value)


def _notes(machine: Run, run: Run, speed: float) -> list[str]:
    ceiling = machine["read_bytes_per_s"]
    read = run["bytes_read_per_token"] * speed
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    notes = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['vector_unit']}{gpu}, "
        f"{format_size(machine['memory_bytes'])} of memory; torch {machine['torch']}, Python {machine['python']}",
        f"prompts of {run['short_prompt_tokens']} and {run['long_prompt_tokens']} tokens; "
        f"{run['decoded_tokens']} tokens decoded on {run['device']}",
    ]
    if run["device"] == "cpu":
        notes.append(
            f"memory is read at {ceiling / 1e9:.1f} GB/s at most; a token reads "
            f"{format_size(run['bytes_read_per_token'])} of weights, so decoding reads {read / 1e9:.1f} GB/s, "
            f"{read / ceiling:.0%} of it"
        )
    return notes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.main_job", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a Hub id, or (without --peer) a .gguf file or smollm2")
    parser.add_argument("--peer", action="store_true", help="measure transformers + bitsandbytes NF4 too")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode; default 32")
    parser.add_argument("--repetitions", type=int, default=3, help="fresh processes of each side; default 3")
    parser.add_argument("--peer-repetitions", type=int, help="fewer for the peer, where it takes minutes")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda; default cpu")
    parser.add_argument("--quantization", default="4bit", help="of Loadstone; default 4bit")
    parser.add_argument("--max-memory", help="of Loadstone, such as 20GB")
    said = parser.parse_args(arguments)
    if said.tokens < 2 or said.repetitions < 1 or (said.peer_repetitions or 1) < 1:
        parser.error("--tokens must be 2 or more, repetitions 1 or more")
    if said.peer and (said.model == "smollm2" or said.model.endswith(".gguf")):
        parser.error("the peer reads no quantised GGUF file: name a folder or a Hub id with safetensors")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line, and return the exit code."""
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    try:
        machine = run_module("benchmarks.machine")
        ours, peer = measure(said, machine["cores"], report)
    except ModuleFailed as failure:
        sys.exit(str(failure))
    name = Path(said.model).name
    screen.print(table_of(name, ours, peer))
    our_medians, peer_medians = medians(ours), medians(peer) if peer else None
    for note in _notes(machine, ours[0], our_medians["decode_tokens_per_s"]):
        screen.print(note, style="dim", highlight=False, soft_wrap=True)
    line = {
        "benchmark": "main_job",
        "model": name,
        "machine": machine,
        "loadstone": our_medians,
        "peer": peer_medians,
        "times_better": ratios(our_medians, peer_medians) if peer_medians is not None else None,
        "runs": {"loadstone": ours, "peer": peer},
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
