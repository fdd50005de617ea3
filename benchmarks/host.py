"""What a token costs beside its arithmetic: a model as deep as Qwen2.5-7B and next to nothing wide, decoded alone.

    python -m benchmarks.host [--folder build/load] [--repetitions 5]

Prints the median milliseconds of a token, then one JSON line. What they contain of arithmetic is the head, whose
megabytes are told beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from loadstone import ModelManager
from loadstone.units import format_size

from .checkpoints import Shape, write_checkpoint
from .machine import describe_machine

SHAPE = Shape(64, 28, 1, 1, 128, 151_936, True)
TOKENS = 128


def milliseconds_of(folder: Path, repetitions: int) -> tuple[list[float], int]:
    """Return the milliseconds of a token in each repetition, and the bytes that are multiplied for one."""
    checkpoint = folder / f"depth-{SHAPE.num_hidden_layers}"
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(SHAPE, checkpoint)
    wish = {"model_config": {"base_model": str(checkpoint), "context": 512}, "engine": {"speculation": False}}
    with ModelManager(wish) as manager:
        manager.load()

        def once() -> float:
            timing = manager.generate("1", max_new_tokens=TOKENS, temperature=0).timing
            return 1e3 / timing.tokens_per_s

        once()  # the step is written down on first use
        return [once() for _ in range(repetitions)], sum(manager.get_model_info()["bytes"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/load"), help="for the checkpoint")
    parser.add_argument("--repetitions", type=int, default=5)
    said = parser.parse_args(arguments)
    measured, nbytes = milliseconds_of(said.folder, said.repetitions)
    median = statistics.median(measured)
    print(f"{median:.2f} ms a token at {SHAPE.num_hidden_layers} layers, {format_size(nbytes)} of weights and cache")
    print(json.dumps({"benchmark": "host", "machine": describe_machine(), "token_ms": measured, "bytes": nbytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
