"""The plug-ins of docs/guides/plug-ins.md, as written there: installed by pip, and seen in doctor, plan and run."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.small_model import GENERATION, write_small_model
from tests.sources.fake_server import Answer, FakeServer

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "plug-ins.md"
MOST_LINES = 80
_BLOCK = re.compile(r"(?:In `(?P<file>[\w/]+\.py)`[^\n]*\n\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Package:
    """A package of the guide: its pyproject.toml, and its files by name."""

    project: Mapping[str, Any]
    files: Mapping[str, str]


def packages() -> dict[str, Package]:
    """Return the packages by name: each begins with a pyproject.toml, and what follows is in it."""
    found: dict[str, Package] = {}
    files: dict[str, str] = {}
    for block in _BLOCK.finditer(GUIDE.read_text(encoding="utf-8")):
        if block["language"] == "toml":
            project, files = tomllib.loads(block["code"])["project"], {}
            found[project["name"]] = Package(project, files)
        elif block["file"]:
            files[block["file"]] = block["code"]
    return found


def wheel(package: Package, folder: Path) -> Path:
    """Build the wheel that a build backend makes of a package."""
    name, version = package.project["name"].replace("-", "_"), package.project["version"]
    about = f"{name}-{version}.dist-info"
    groups = package.project["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *(f"{a} = {b}" for a, b in names.items()))]
    files = {
        **package.files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package.project['name']}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "\n".join(lines) + "\n",
    }
    record = [f"{path},{digest(text.encode())},{len(text.encode())}" for path, text in files.items()]
    files[f"{about}/RECORD"] = "\n".join([*record, f"{about}/RECORD,,"]) + "\n"
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return file


def digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


class FakeShelf(FakeServer):
    """The server of the guide's source: an index, and the files beside it."""

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        folder, _, name = path.rpartition("/")
        if folder != "/tiny":
            return Answer(404)
        if name != "index.json":
            return self.file(name)
        listed = [
            {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.files.items()
        ]
        return Answer(200, json.dumps(listed).encode())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed both packages."""
    folder = tmp_path_factory.mktemp("plug-ins")
    wheels = [str(wheel(package, folder)) for package in packages().values()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder / "site"), *wheels], check=True, timeout=120)
    return folder / "site"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeShelf]:
    folder = write_small_model(tmp_path_factory.mktemp("shelf") / "tiny", **GENERATION)
    with FakeShelf({file.name: file.read_bytes() for file in folder.iterdir()}) as running:
        yield running


# One process, since each would import torch anew: the commands one after the other, each answer a line of JSON.
COMMANDS = """
import json, sys
from loadstone.cli import main
for line in sys.stdin.read().splitlines():
    try:
        main(json.loads(line))
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""


@pytest.fixture(scope="module")
def told(
    installed: Path, shelf: FakeShelf, tmp_path_factory: pytest.TempPathFactory, new_home: Callable[[Path], Path]
) -> dict[str, dict[str, Any]]:
    """What the commands say of the plug-ins, in a process of its own."""
    home = new_home(tmp_path_factory.mktemp("home") / "loadstone")
    how = ["--quantization", "3bit", "--context", "512", "--device", "cpu"]
    run = ["run", "shelf:tiny", "Hello.", *how, "--max-new-tokens", "8", "--seed", "1", "--json"]
    plan = ["plan", "shelf:tiny", *how, "--json"]
    commands = {"doctor": ["doctor", "--json"], "plan": plan, "run": run, "again": run, "after": plan}
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LOADSTONE_"))}
    paths = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(map(json.dumps, commands.values())),
        env={**plain, "PYTHONPATH": paths, "LOADSTONE_HOME": str(home), "SHELF_URL": shelf.endpoint, "PYTHONUTF8": "1"},
        cwd=home, capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(commands), done.stdout
    return dict(zip(commands, answers, strict=True))


# As written


@pytest.mark.parametrize("name", ["loadstone-three-bit", "loadstone-shelf"])
def test_a_plug_in_is_short(name: str) -> None:
    assert sum(len(code.splitlines()) for code in packages()[name].files.values()) < MOST_LINES


def test_doctor_tells_of_both(told: dict[str, dict[str, Any]]) -> None:
    found = {one["name"]: (one["package"], one["problem"]) for one in told["doctor"]["plug_ins"]}
    assert found == {"3bit": ("loadstone-three-bit 1.0", None), "shelf": ("loadstone-shelf 1.0", None)}
    assert "3bit" in told["doctor"]["known"]["strategies"]
    assert "shelf" in told["doctor"]["known"]["sources"]


def test_plan_knows_both_before_anything_is_fetched(told: dict[str, dict[str, Any]], shelf: FakeShelf) -> None:
    plan = told["plan"]
    assert plan["origin"] == "shelf: tiny"
    assert plan["plan"]["strategy"] == "3bit"
    assert plan["missing_bytes"] >= plan["file_bytes"] == len(shelf.files["model.safetensors"])
    weights = {row["strategy"]: sum(row["bytes"]["weights"].values()) for row in plan["strategies"]}
    assert weights["3bit"] < weights["4bit"] < weights["8bit"]


def test_run_answers_with_both(told: dict[str, dict[str, Any]]) -> None:
    assert told["run"]["strategy"] == "3bit"
    assert told["run"]["usage"]["completion_tokens"] == 8
    assert told["run"]["model"] == "shelf:tiny"


def test_the_weights_are_kept_and_a_later_run_answers_the_same_with_them(told: dict[str, dict[str, Any]]) -> None:
    in_store = [{row["strategy"]: row["in_store"] for row in told[name]["strategies"]} for name in ("plan", "after")]
    assert [one["3bit"] for one in in_store] == [False, True]
    assert told["again"]["text"] == told["run"]["text"]


def test_the_weights_are_fetched_once(told: dict[str, dict[str, Any]], shelf: FakeShelf) -> None:
    starts = [one.headers.get("range") for one in shelf.asked_for("model.safetensors")]
    size = len(shelf.files["model.safetensors"])
    assert starts == ["bytes=0-16383", f"bytes=0-{size - 1}"]


# The strategy itself


@pytest.fixture
def three_bit(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(installed)
    yield importlib.import_module("loadstone_three_bit").ThreeBit()
    for name in [name for name in sys.modules if name.startswith("loadstone_three_bit")]:
        del sys.modules[name]


@pytest.mark.parametrize(("part", "rows", "columns"), [("linear", 96, 128), ("linear", 10, 40), ("lm_head", 64, 128)])
def test_the_plan_counts_the_bytes_that_the_tensors_take(three_bit: Any, part: str, rows: int, columns: int) -> None:
    import torch

    linear = three_bit.quantize(part, [torch.randn(rows, columns)], torch.device("cpu"), torch.float32)
    assert linear.nbytes == three_bit.weight_bytes(part, rows, columns)


def test_a_weight_is_as_near_as_three_bits_allow_and_the_product_is_that_of_it(three_bit: Any) -> None:
    import torch

    weight, x = torch.randn(96, 256, generator=torch.Generator().manual_seed(1)), torch.randn(5, 256)
    linear = three_bit.quantize("linear", [weight[:32], weight[32:]], torch.device("cpu"), torch.float32)
    near = linear.dequantize(0, 96, torch.float32)
    steps = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 3.5
    assert ((near - weight).unflatten(1, (-1, 64)).abs() <= steps * 0.51).all()
    torch.testing.assert_close(linear(x), x @ near.T, rtol=1e-4, atol=1e-4)
    restored = three_bit.restore("linear", linear.tensors(), linear.facts, torch.float32)
    torch.testing.assert_close(restored.dequantize(7, 9, torch.float32), near[7:9], rtol=0, atol=0)
