"""Checkpoints that are quantised already, one of each format: what they are kept as, how exactly, and how fast.

    python -m benchmarks.formats [--only TEXT] [--repetitions 3] [--folder build/formats]

Writes a small model of random weights in every format that is read, each by its own library or its specification as the
tests do, and loads it in fresh processes. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadstone.units import format_size

from .checkpoints import Shape, write_checkpoint
from .options import one_or_more
from .processes import ModuleFailed, run_module

SHAPE = Shape(1024, 8, 16, 4, 2816, 16_384, False)  # sizes are multiples of 128, so that all groups are whole
TABLE_WIDTH = 160  # where the screen does not say how wide it is
PLAIN, GGUF = "bfloat16", "GGUF "
GGUF_TYPES = ("Q8_0", "Q5_1", "Q4_0")
REFERENCE = "reference.safetensors"
FIRST_LAYER = ".layers.0."


def formats() -> dict[str, Callable[[Path, Path], None]]:
    """Return what writes a checkpoint of each format, by name: from the plain one's folder into another."""
    from tests.quantized_checkpoints import FORMATS

    found: dict[str, Callable[[Path, Path], None]] = {PLAIN: _copy}
    found |= {name: _writer(form) for name, form in FORMATS.items()}
    return found | {GGUF + kind: _gguf_writer(kind) for kind in GGUF_TYPES}


def _copy(plain: Path, into: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(plain, into)
    _keep_reference(into, load_file(plain / "model.safetensors"))


def _writer(form: Callable[[], Any]) -> Callable[[Path, Path], None]:
    def write(plain: Path, into: Path) -> None:
        from tests.quantized_checkpoints import quantize_folder

        _keep_reference(into, quantize_folder(plain, into, form()).numbers)

    return write


def _gguf_writer(kind: str) -> Callable[[Path, Path], None]:
    def write(plain: Path, into: Path) -> None:
        import gguf
        import torch
        from safetensors.torch import load_file
        from tests.checkpoint.tiny_models import write_gguf

        config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(plain / "model.safetensors")
        into.mkdir()
        write_gguf(into / "model.gguf", {**config, "head_dim": SHAPE.head_size}, tensors, kind=kind)
        packed = gguf.GGMLQuantizationType[kind]
        numbers = {}
        for name, tensor in tensors.items():
            if FIRST_LAYER in name and tensor.ndim == 2:
                whole = gguf.quants.quantize(tensor.float().numpy(), packed)
                numbers[name] = torch.from_numpy(gguf.quants.dequantize(whole, packed))
        _keep_reference(into, numbers)

    return write


def _keep_reference(folder: Path, numbers: Mapping[str, Any]) -> None:
    """Write what the format means by the matrices of the first layer, in a folder that no model is read from."""
    from safetensors.torch import save_file

    beside = folder / "reference"
    beside.mkdir()
    first = {name: one.float() for name, one in numbers.items() if FIRST_LAYER in name and one.ndim == 2}
    save_file(first, beside / REFERENCE)


def measure(name: str, plain: Path, folder: Path, said: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Return the figures of one format: medians of fresh processes."""
    made = folder / "model"
    shutil.rmtree(made, ignore_errors=True)
    formats()[name](plain, made)
    task = json.dumps({"model": str(made), "reference": str(made / "reference" / REFERENCE), "threads": threads})
    runs = [run_module("benchmarks.measure_formats", task) for _ in range(said.repetitions)]
    shutil.rmtree(made)
    return {
        "format": name,
        **runs[0],
        "load_s": statistics.median(run["load_s"] for run in runs),
        "decode_tokens_per_s": statistics.median(run["decode_tokens_per_s"] for run in runs),
        "runs": runs,
    }


def table_of(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table: a row for each format."""
    table = Table(title="checkpoints that are quantised already", title_justify="left")
    for title in ("format", "kept as", "files", "weights", "load, s", "off by", "decode, tok/s"):
        table.add_column(title, justify="left" if title in ("format", "kept as") else "right")
    for one in results:
        table.add_row(
            one["format"], one["strategy"], format_size(one["file_bytes"]), format_size(one["weight_bytes"]),
            f"{one['load_s']:.2f}", f"{one['error']:.1e}", f"{one['decode_tokens_per_s']:.0f}",
        )  # fmt: skip
    return table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only formats with this in their name")
    parser.add_argument("--repetitions", type=one_or_more, default=3, help="of each format; default 3")
    parser.add_argument("--folder", type=Path, default=Path("build/formats"), help="default build/formats")
    said = parser.parse_args(arguments)
    said.names = [name for name in formats() if said.only in name]
    if not said.names:
        parser.error(f"no format has {said.only!r} in its name; there are {'; '.join(formats())}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line, and return the exit code."""
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    results: list[dict[str, Any]] = []
    try:
        machine = run_module("benchmarks.machine")
        plain = said.folder / "plain"
        shutil.rmtree(said.folder, ignore_errors=True)
        said.folder.mkdir(parents=True)
        write_checkpoint(SHAPE, plain, tokenizer=said.folder)  # which has none: no text is read here
        for name in said.names:
            report.print(f"{name} …", style="dim")
            results.append(measure(name, plain, said.folder, said, int(machine["cores"])))
    except (ModuleFailed, OSError) as failure:
        sys.exit(str(failure))
    finally:
        shutil.rmtree(said.folder, ignore_errors=True)
    screen.print(table_of(results))
    print(json.dumps({"benchmark": "formats", "machine": machine, "shape": vars(SHAPE), "formats": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
