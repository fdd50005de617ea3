"""The options that benchmarks of several shapes and sides have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def new_parser(
    module: str, description: str, *, shapes: Iterable[str], peers: Sequence[str], repetitions: int, unit: str
) -> argparse.ArgumentParser:
    """Return a parser with the common options; `unit` is what is repeated, such as "each case"."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    known = tuple(shapes)
    for option, names, more in (("--shapes", known, ""), ("--peers", tuple(peers), "; '' for none")):
        all_of_them = ",".join(names)
        parser.add_argument(option, type=names_among(names), default=all_of_them, help=f"default {all_of_them}{more}")
    parser.add_argument("--folder", type=Path, default=Path("build/load"), help="for all files; default build/load")
    parser.add_argument(
        "--repetitions", type=one_or_more, default=repetitions, help=f"of {unit} of Loadstone; default {repetitions}"
    )
    parser.add_argument("--peer-repetitions", type=one_or_more, default=1, help=f"of {unit} of the peers; default 1")
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json, for checkpoints not there yet")
    parser.add_argument("--max-memory", help="of Loadstone, such as 20GB")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where models run."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: cuda where there is a GPU"
    )  # fmt: skip


def device_of(said: argparse.Namespace, machine: Mapping[str, Any]) -> str:
    """Return where models run: what was said, or what this machine has."""
    if said.device != "auto":
        return str(said.device)
    return "cuda" if machine["gpu"] else "cpu"


def names_among(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what reads names that are separated by commas, and refuses those that are not known."""

    def names(text: str) -> list[str]:
        found = [part for part in text.split(",") if part]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return found

    return names


def one_or_more(text: str) -> int:
    """Return a number that is 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number
