"""What keeping weights in few bits costs: perplexity, and how often the likeliest token stays the same.

    python -m benchmarks.quality [MODEL] [--text FILE …] [--window 512]

MODEL is smollm2 unless it is named. Each way to keep weights is a fresh process that reads the same weights and the
same tokens; the first, unquantised, is the reference. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadstone.checkpoint import ModelSpec, Tokenizer, inspect, load_tokenizer
from loadstone.errors import LoadstoneError
from loadstone.sources import resolve

from .processes import ModuleFailed, run_module
from .quality_report import INTEGERS, PEERS, SIDES, Result, Side, is_within_bar, notes_of, table_of, told
from .quality_scores import scores_of
from .untied import write_untied

ROOT = Path(__file__).parents[1]
TEXTS = {
    "English": ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"),
    "Chinese": ("README.zh-CN.md",),
}
TABLE_WIDTH = 160  # where the screen does not say how wide it is
LONGEST_TEXT = 16_384  # tokens of each text, unless it is said otherwise


@dataclass(frozen=True)
class Text:
    """A text by its name, cut into windows of tokens; `digest` is SHA-256 of its UTF-8."""

    name: str
    windows: list[list[int]]
    digest: str


def texts_of(files: Sequence[Path], tokenizer: Tokenizer, window: int, most: int) -> list[Text]:
    """Return the texts of `files`, or the project's own documents where there are none."""
    named = {file.name: [file] for file in files} or {
        name: [ROOT / one for one in parts] for name, parts in TEXTS.items()
    }
    found = []
    for name, parts in named.items():
        text = "\n".join(part.read_text(encoding="utf-8") for part in parts)
        digest = hashlib.sha256(text.encode()).hexdigest()
        found.append(Text(name, windows_of(text, tokenizer, window, most), digest))
    return found


def windows_of(text: str, tokenizer: Tokenizer, window: int, most: int) -> list[list[int]]:
    """Return whole windows of a text's first `most` tokens; a text shorter than a window is one by itself.

    Each begins with what the tokenizer puts before every text.
    """
    begin = tokenizer.encode("", add_special_tokens=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)[:most]
    step = min(window - len(begin), len(tokens))
    if step + len(begin) < 2:
        raise ValueError("a text or window of fewer than two tokens has nothing to predict")
    return [begin + tokens[start : start + step] for start in range(0, len(tokens) - step + 1, step)]


def folder_of(spec: ModelSpec, beside: Path) -> Path:
    """Return a folder with the model's weights as safetensors and a head of its own, made in `beside` where needed."""
    if spec.format != "gguf" and not spec.tied_embeddings:
        return spec.folder
    write_untied(spec, beside / "model")
    return beside / "model"


def measure(
    folder: Path, texts: Sequence[Text], threads: int, beside: Path, report: Console
) -> tuple[dict[Side, Result], dict[str, str]]:
    """Return each side's result, and why a peer has none."""
    windows = beside / "windows.json"
    windows.write_text(json.dumps([window for text in texts for window in text.windows]), encoding="utf-8")
    common = {
        "folder": str(folder), "windows": str(windows), "reference": str(beside / "reference"), "threads": threads,
    }  # fmt: skip
    results: dict[Side, Result] = {}
    left_out: dict[str, str] = {}
    for side in SIDES:
        report.print(f"{side.label} …", style="dim")
        try:
            found = run_module(side.module, json.dumps({**common, **side.task}))
        except ModuleFailed as failure:
            if side not in PEERS:
                raise
            report.print(f"{side.label} is left out: {failure}", style="red", markup=False)
            left_out[side.label] = str(failure).strip().splitlines()[-1]
            continue
        scores = scores_of(found["scores"])
        by_text = {}
        for text in texts:
            by_text[text.name], scores = scores[: len(text.windows)], scores[len(text.windows) :]
        results[side] = Result(found["bytes_read_per_token"], by_text)
    return results, left_out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says; exits with 2 for what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a Hub id or a .gguf; default smollm2")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="one or more texts, "
                        "in UTF-8; default: the project's own documents, in English and in Chinese")  # fmt: skip
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at once; default 512")
    parser.add_argument("--tokens", type=int, default=LONGEST_TEXT, help=f"of each text; default {LONGEST_TEXT}")
    said = parser.parse_args(arguments)
    if said.window < 2 or said.tokens < 2:
        parser.error("--window and --tokens must be 2 or more")
    if missing := [str(file) for file in said.text if not file.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON line, and return the exit code."""
    said = parse(arguments)
    report, screen = Console(stderr=True), Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    try:
        spec = inspect(resolve(said.model))
        texts = texts_of(said.text, load_tokenizer(spec), said.window, said.tokens)
        machine = run_module("benchmarks.machine")
        with tempfile.TemporaryDirectory(prefix="loadstone-quality-") as beside:
            folder = folder_of(spec, Path(beside))
            results, left_out = measure(folder, texts, int(machine["cores"]), Path(beside), report)
    except (ModuleFailed, LoadstoneError, OSError, ValueError) as failure:
        sys.exit(str(failure))
    screen.print(table_of(Path(said.model).name, results))
    for note in notes_of(results, left_out):
        screen.print(note, style="dim", highlight=False, soft_wrap=True, markup=False)
    print(json.dumps(_line(said, machine, texts, results)))
    return 0


def _line(
    said: argparse.Namespace, machine: Mapping[str, object], texts: Sequence[Text], results: Mapping[Side, Result]
) -> dict[str, object]:
    about = {
        text.name: {"sha256": text.digest, "windows": len(text.windows), "tokens": sum(map(len, text.windows))}
        for text in texts
    }
    return {
        "benchmark": "quality", "model": Path(said.model).name, "window": said.window, "machine": dict(machine),
        "texts": about, "sides": told(results), "is_within_bar": is_within_bar(results),
        "int4_is_within_bar": is_within_bar(results, INTEGERS),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
