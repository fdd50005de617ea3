"""The documents say what is so: their code runs, their commands exist, and the two READMEs are equal."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import loadstone

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = (
    *READMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md",
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")),
)  # fmt: skip
WEB_HOSTS = {"keepachangelog.com", "semver.org", "models.example"}

_BLOCK = re.compile(r"^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document: its language and its text."""

    language: str
    code: str


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str | None = None) -> list[Block]:
    found = [Block(one["language"], one["code"]) for one in _BLOCK.finditer(text_of(name))]
    return [one for one in found if language in (None, one.language)]


def headings(name: str) -> list[str]:
    """Return the levels of a document's headings, in order."""
    plain = _BLOCK.sub("", text_of(name))
    return re.findall(r"^(#+) ", plain, re.MULTILINE)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not here")
    # What an outer make says to its children would change this one.
    plain = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    for name in ("MODEL", "PROMPT", "ARGS"):
        plain.pop(name, None)
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, env=plain, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_block_compiles(name: str) -> None:
    for block in blocks(name, "python"):
        compile(block.code, name, "exec")


def test_every_name_that_the_readme_imports_is_public() -> None:
    for block in blocks("README.md", "python"):
        for names in re.findall(r"^from loadstone import (.+)$", block.code, re.MULTILINE):
            assert set(names.split(", ")) <= set(loadstone.__all__)


@pytest.mark.parametrize("name", READMES)
def test_the_configuration_example_is_the_configuration_file(name: str) -> None:
    """But for the settings that the file has as comments."""
    (example,) = blocks(name, "yaml")
    assert text_of("config/config.yaml").startswith(f"{example.code}\n#")


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_option_of_the_readme_exists(name: str) -> None:
    from click import Group

    from loadstone.cli.app import loadstone as program

    lines = [line for block in blocks(name, "sh") for line in block.code.splitlines() if line.startswith("loadstone ")]
    assert {line.split()[1] for line in lines} == set(program.commands)
    for line in lines:
        _, name, *words = line.split()
        command = program.commands[name]
        if isinstance(command, Group):
            command = command.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", line)) <= known


def test_both_readmes_have_the_same_headings() -> None:
    english, chinese = map(headings, READMES)
    assert english == chinese


def test_both_readmes_have_the_same_blocks() -> None:
    english, chinese = map(blocks, READMES)
    assert english == chinese


def test_both_readmes_have_the_same_figures_and_names() -> None:
    """What stands in tables as a number or as code is not translated, so it must agree."""

    def facts(name: str) -> list[list[str]]:
        rows = [line for line in text_of(name).splitlines() if line.startswith("|")]
        return [re.findall(r"`[^`]+`|[0-9]+(?:\.[0-9]+)?|…", row) for row in rows]

    english, chinese = map(facts, READMES)
    assert english == chinese


@pytest.mark.parametrize("target", ["run", "test"])
def test_make_knows_the_commands_of_the_readme(target: str) -> None:
    assert f"make {target}" in text_of("README.md")
    done = make(target)
    assert done.returncode == 0, done.stderr


def test_make_run_passes_its_arguments_on() -> None:
    done = make("run", "MODEL=org/name", "ARGS=--max-new-tokens 5")
    last = done.stdout.strip().splitlines()[-1]
    assert "loadstone run" in last
    assert "org/name" in last
    assert "--max-new-tokens 5" in last


def test_the_version_is_the_same_in_the_package_and_its_project_file_and_the_changelog() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert loadstone.__version__ == project["version"]
    assert f"## [{loadstone.__version__}]" in text_of("CHANGELOG.md")


def test_the_architecture_names_every_dependency() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    table = text_of("ARCHITECTURE.md").partition("## Dependencies")[2].partition("\n## ")[0]
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=!~\[ ;]", requirement)[0]
        assert f"`{name}`" in table


def test_the_architecture_names_every_room() -> None:
    package = ROOT / "src" / "loadstone"
    files = (file.stem for file in package.glob("[a-z]*.py"))
    folders = (file.parent.name for file in package.glob("*/__init__.py"))
    house = text_of("ARCHITECTURE.md").partition("## The house")[2].partition("\n## ")[0]
    for room in (*files, *folders):
        assert re.search(rf"\b{room}\b", house)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_files_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text_of(name)):
        if not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_document_names_a_place_on_somebodys_machine_or_an_unexpected_server(name: str) -> None:
    text = text_of(name)
    assert not re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp|opt|mnt)/|[A-Z]:\\", text)
    assert set(re.findall(r"https?://([^/\s)]+)", text)) <= WEB_HOSTS
