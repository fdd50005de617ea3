"""What it costs that an answer follows a grammar: to make one, and for each token, at Qwen's vocabulary.

    python -m benchmarks.structured [--tokenizer FOLDER] [--documents 20]

Texts that follow each grammar are gone through token by token: what is sure to come is asked for, the mask is made and
put on the logits, and the token taken. Times are of the thread that does it, which other programs do not lengthen.
Prints a table, then one JSON line. Without a folder with Qwen's tokenizer.json a tokenizer of the same size is made.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import Sampling
from loadstone.engine._llguidance import Grammar, Grammars

from .machine import describe_machine
from .tokenizer import write_tokenizer

VOCABULARY = 151_936
NAMES = ["Ada Lovelace", "张伟", 'Zoë "Z" O\'Neil', "Grace Brewster Murray Hopper"]
WORDS = [f"{chr(97 + number % 10)}{number * 7919 % 10**6:06d}" for number in range(2000)]


def closed(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has all these properties and no others."""
    return {
        "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False,
    }  # fmt: skip


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
ITEM = closed(
    sku={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, price=NUMBER, tags={"type": "array", "items": TEXT}
)
PERSON = closed(name=TEXT, age={"type": "integer"})
ORDER = closed(number={"type": "integer"}, customer=PERSON, items={"type": "array", "items": ITEM}, note=TEXT)
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": closed(value=TEXT, below={"type": "array", "items": {"$ref": "#/$defs/node"}})},
}


def person(chance: random.Random) -> Any:
    """Return a value of PERSON."""
    return {"name": chance.choice(NAMES), "age": chance.randrange(100)}


def order(chance: random.Random) -> Any:
    """Return a value of ORDER."""
    items = [
        {"sku": f"ABC-{chance.randrange(10**4):04d}", "price": 2.5, "tags": ["new", "on sale", "特价"]}
        for _ in range(5)
    ]
    note = "Leave the parcel with the neighbour when nobody answers the door. Thank you very much!"
    return {"number": chance.randrange(10**6), "customer": person(chance), "items": items, "note": note}


def tree(chance: random.Random, levels: int = 3) -> Any:
    """Return a value of TREE."""
    return {
        "value": f"leaf {chance.randrange(100)}",
        "below": [tree(chance, levels - 1) for _ in range(2 * bool(levels))],
    }


def _json(make: Callable[[random.Random], Any]) -> Callable[[random.Random], str]:
    return lambda chance: json.dumps(make(chance), ensure_ascii=False)


def _word(chance: random.Random) -> str:
    return chance.choice(WORDS)


ADDRESS = Sampling(regex=r"[a-z0-9._]{1,30}@[a-z0-9-]{1,30}\.(com|org)")
ANY_TEXT = Sampling(regex=r"(.|\n){0,2000}")

CASES: dict[str, tuple[Sampling, Callable[[random.Random], str]]] = {
    "schema: small": (Sampling(json_schema=json.dumps(PERSON)), _json(person)),
    "schema: nested": (Sampling(json_schema=json.dumps(ORDER)), _json(order)),
    "schema: 2000 words": (Sampling(json_schema=json.dumps({"enum": WORDS})), _json(_word)),
    "schema: in itself": (Sampling(json_schema=json.dumps(TREE)), _json(tree)),
    "schema: any": (Sampling(json_schema="{}"), _json(order)),
    "regex: address": (ADDRESS, lambda _: "grace.hopper@example.com"),
    "regex: any text": (ANY_TEXT, lambda _: "Once upon a time there was a very long line. " * 5),
    "2000 choices": (Sampling(choices=tuple(WORDS)), _word),
}


def follow(grammar: Grammar, tokens: Sequence[int], logits: torch.Tensor) -> tuple[list[float], int]:
    """Go through the tokens of a text; return the milliseconds of each, and how many of them were sure beforehand."""
    times, sure, ahead = [], 0, 0
    for token in tokens:
        begun = time.thread_time()
        if ahead == 0:
            ahead = len(grammar.sure())
        assert grammar.allow(logits)[token] == 0, "the text does not follow its grammar"
        grammar.take(token)
        times.append(1e3 * (time.thread_time() - begun))
        sure += ahead > 0
        ahead = max(0, ahead - 1)
    return times, sure


def measure(backend: tokenizers.Tokenizer, documents: int) -> dict[str, Any]:
    """Return what was measured, by case."""
    begun = time.thread_time()
    grammars = Grammars(Tokenizer(backend), VOCABULARY, [VOCABULARY - 1])
    grammars.of(Sampling(choices=("a",)))
    found: dict[str, Any] = {"tokenizer_ms": 1e3 * (time.thread_time() - begun)}
    logits = torch.zeros(VOCABULARY)
    for name, (sampling, make) in CASES.items():
        chance = random.Random(1)
        begun = time.thread_time()
        grammars.of(sampling)
        making = 1e3 * (time.thread_time() - begun)
        times, sure = [], 0
        for _ in range(documents):
            grammar = grammars.of(sampling)
            assert grammar is not None
            ms, known = follow(grammar, backend.encode(make(chance)).ids, logits)
            times += ms
            sure += known
        times.sort()
        found[name] = {
            "making_ms": making, "tokens": len(times), "sure": sure / len(times), "mean_ms": sum(times) / len(times),
            "median_ms": times[len(times) // 2], "p99_ms": times[int(0.99 * len(times))], "most_ms": times[-1],
        }  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured", description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer.json")
    parser.add_argument("--documents", type=int, default=20, help="texts for each grammar")
    said = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        if said.tokenizer is None:
            write_tokenizer(Path(made))
        backend = tokenizers.Tokenizer.from_file(str((said.tokenizer or Path(made)) / "tokenizer.json"))
    torch.set_num_threads(1)
    found = measure(backend, said.documents)
    print("grammar             made in   tokens  sure   median   mean     p99      most, ms a token")
    for name, one in found.items():
        if name in CASES:
            times = "  ".join(f"{one[key]:7.3f}" for key in ("median_ms", "mean_ms", "p99_ms", "most_ms"))
            print(f"{name:18}  {one['making_ms']:5.1f} ms  {one['tokens']:6}  {one['sure']:4.0%}  {times}")
    print(f"the tokenizer is taken in {found['tokenizer_ms']:.0f} ms, once")
    print(json.dumps({"benchmark": "structured", "machine": describe_machine(), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
