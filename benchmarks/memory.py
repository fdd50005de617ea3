"""What a plan says that a model will take, beside what it takes: loads of several shapes, strategies and contexts.

    python -m benchmarks.memory [--shapes smollm2,qwen2.5-0.5b] [--folder build/load]

Every load is a fresh process, which then fills every stream's context. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .checkpoints import write_checkpoint
from .job import is_whole
from .memory_cases import BUNDLED, MEMORY_SHAPES, Case, cases_of
from .memory_report import is_kept, table_of
from .options import new_parser
from .prepared import plain_environment
from .processes import ModuleFailed, run_module
from .turns import exit_code_of

MODULE = "benchmarks.measure_memory"
TABLE_WIDTH = 160  # where the screen does not say how wide it is


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
    task = {"config": {"model_config": wish}, "context": case.context, "streams": case.streams}
    return run_module(MODULE, json.dumps(task), environment=plain_environment(home))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line; return 0 when every promise was kept, else 1, or 130 after Ctrl-C."""
    about = __doc__.splitlines()[0]
    parser = new_parser(
        "memory", about, shapes=(BUNDLED, *MEMORY_SHAPES), peers=(), repetitions=1, unit="each load"
    )  # fmt: skip
    said = parser.parse_args(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    runs: list[tuple[Case, dict[str, Any]]] = []
    failures: dict[str, str] = {}

    def measure() -> None:
        for model in said.shapes:
            checkpoint = checkpoint_of(model, said.folder, said.tokenizer, report)
            home = said.folder / "memory-home" / model
            for case in [case for case in cases_of(model) for _ in range(said.repetitions)]:
                report.print(f"{case.name} …", style="dim")
                try:
                    runs.append((case, measure_case(case, checkpoint, home, said.max_memory)))
                except ModuleFailed as failure:
                    failures[case.name] = str(failure)
                    report.print(str(failure), style="red", markup=False)
            shutil.rmtree(home / "cache" / "store", ignore_errors=True)

    code = exit_code_of(measure, report)
    screen.print(table_of(runs))
    told = [{"case": case.name, **found} for case, found in runs]
    print(json.dumps({"benchmark": "memory", "loads": told, "failures": failures}))
    return code or int(bool(failures) or not all(is_kept(found) for _, found in runs))


if __name__ == "__main__":
    sys.exit(main())
