"""Every block of Python and of the shell in the README and in the guides is run, against a Hub on loopback.

What they call Qwen2.5-7B-Instruct is a small random model there; `smollm2` is what it is. A document's blocks run in
their order, in one process for each language.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.engine.tool_templates import QWEN
from tests.small_model import write_small_model
from tests.sources.fake_hub import FakeHub

ROOT = Path(__file__).parents[1]
GUIDES = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh"}
NOT_RUN = {"console", "text", "yaml", "json", "toml", "mermaid", "{eval-rst}", "{toctree}"}
"""Blocks that show: of these `console` is for what needs files or a network that a test has not."""

MADE_BY_MAKE = ("make run", "make test")  # the README's own set-up, which runs this test

# Runs the lines of a document in one process, since each of its own would import torch anew.
COMMANDS = """
import contextlib, json, shlex, sys
from loadstone.cli import main
for line in json.loads(sys.argv[1]):
    words = shlex.split(line, comments=True)
    asked = None
    if "<" in words:
        at = words.index("<")
        asked = open(words[at + 1], encoding="utf-8")
        words = words[:at] + words[at + 2:]
    assert words[0] == "loadstone", line
    sys.stdin = asked or open("empty.txt", encoding="utf-8")
    print("$", line, flush=True)
    try:
        main(words[1:])
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit code {end.code} of: {line}")
"""

_BLOCK = re.compile(r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


class Hub(FakeHub):
    """A Hub that has the model of the documents."""

    repository = "Qwen/Qwen2.5-7B-Instruct"


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [one["code"] for one in _BLOCK.finditer(text) if one["language"] == language]


def commands(name: str) -> list[str]:
    """The lines of a document's shell blocks, those that `\\` continues as one."""
    lines = [line for code in blocks(name, "sh") for line in code.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith(("#", *MADE_BY_MAKE))]


def guides_with(language: str) -> list[str]:
    return [name for name in GUIDES if blocks(name, language)]


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """The environment of somebody with an empty home, a Hub on loopback, and no network beside it."""
    home = tmp_path_factory.mktemp("guides")
    model = write_small_model(home / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 32_768}
    (model / "config.json").write_text(json.dumps(config))
    about = json.loads((model / "tokenizer_config.json").read_text()) | {
        "chat_template": QWEN
    }  # which tells of functions
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    with Hub({file.name: file.read_bytes() for file in model.iterdir()}) as hub:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LOADSTONE_"))}
        yield {
            **plain, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(home / "hub"), "NO_PROXY": "127.0.0.1",
            "LOADSTONE_HOME": str(home / "loadstone"), "PYTHONUTF8": "1", "NO_COLOR": "1",
        }  # fmt: skip


def run(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=dict(environment), capture_output=True, encoding="utf-8",
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", guides_with("python"))
def test_the_python_of_a_document_runs(name: str, tmp_path: Path, surroundings: Mapping[str, str]) -> None:
    shown = run(["-c", "\n".join(blocks(name, "python"))], tmp_path, surroundings)
    assert not re.search(r"\b(Chunk|GenerationResult|Receipt)\(", shown)  # what is printed is for people


@pytest.mark.parametrize("name", [name for name in guides_with("sh") if commands(name)])
def test_the_commands_of_a_document_run(name: str, tmp_path: Path, surroundings: Mapping[str, str]) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "question.txt").write_text("What is a bond?\n", encoding="utf-8")
    shown = run(["-c", COMMANDS, json.dumps(commands(name))], tmp_path, surroundings)
    assert shown.count("$ loadstone") == len(commands(name))


@pytest.mark.parametrize("name", GUIDES)
def test_a_block_says_what_it_is(name: str) -> None:
    languages = {one["language"] for one in _BLOCK.finditer((ROOT / name).read_text(encoding="utf-8"))}
    assert languages <= LANGUAGES | NOT_RUN
