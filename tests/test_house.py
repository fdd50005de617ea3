"""The rules of the house: who may import whom, what an import costs, which names are public; and nothing prints."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import loadstone

ROOT = Path(loadstone.__file__).parent

# From the ground up; a room may import those on lines below its own, and none beside it. An import under
# TYPE_CHECKING counts like any other: who names a type knows the room that it is from.
HOUSE = (
    ("errors", "units", "folders", "memory", "startup", "telemetry", "_blake3"),
    ("config", "retry", "plugins"),
    ("checkpoint", "hardware", "sources"),
    ("quantization", "store"),
    ("planner", "light"),
    ("model",),
    ("engine", "bridge"),
    ("loaded", "forecast"),
    ("life",),
    ("manager",),
    ("cli", "server", "jobs", "testing"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}

# The second file of a vendor, by its reason.
EXCUSED = {("jinja2", "checkpoint/template.py"): "names the errors of the templates that _jinja.py compiles"}
VENDORS = {
    "bitsandbytes", "blake3", "fsspec", "gguf", "huggingface_hub", "jinja2", "llguidance", "llvmlite", "modelscope_hub",
    "transformers",
}  # fmt: skip
HEAVY = {
    "torch", "transformers", "bitsandbytes", "numpy", "pydantic", "huggingface_hub", "tokenizers", "llvmlite",
    "llguidance",
}  # fmt: skip

PUBLIC = [
    "CheckpointError", "Chunk", "ConfigManager", "ConfigurationError", "ContextLengthError", "Device", "DeviceManager",
    "Event", "Forecast", "GenerationConfig", "GenerationError", "GenerationResult", "LoadstoneError", "MemoryReport",
    "ModelLoadError", "ModelManager", "ModelNotLoadedError", "QueueFullError", "Receipt", "ResourceError",
    "SourceError", "Stream", "ToolCall", "TransientSourceError", "get_device_manager", "get_model_manager",
    "handle_exceptions", "load_qwen_model", "plan", "retry_on_exception", "subscribe",
]  # fmt: skip

FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """The line and the whole name of every import, wherever in the file it stands."""
    package = ["loadstone", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from . import bundled` names modules, `from .base import ModelFiles` does not; both forms are looked at.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _violations(file: Path) -> list[str]:
    mine = _room(file.relative_to(ROOT).parts)
    found = []
    for line, name in _imports(file):
        top, _, rest = name.partition(".")
        theirs = rest.split(".")[0]
        theirs = loadstone._HOME.get(theirs, theirs)  # a public name, from the porch
        if name == "loadstone.__version__":
            continue
        if top != "loadstone" or theirs == mine:
            continue
        if theirs not in FLOOR:
            found.append(f"line {line}: {name} is in no room; import from the room that has it")
        elif FLOOR[theirs] >= FLOOR[mine]:
            found.append(f"line {line}: {mine} may not know {theirs}")
    return found


@each_file
def test_imports_go_down_only(file: Path) -> None:
    """A room imports from below; rooms side by side do not know each other."""
    if file == ROOT / "__init__.py":
        return  # the porch: it names what is public, and every room stands behind it
    assert _room(file.relative_to(ROOT).parts) in FLOOR, "a new room: say in HOUSE where it stands"
    assert not _violations(file)


def test_wrong_imports_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upward, sideways, relative, late and type-only imports are all found."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "sources" / "deep.py"
    file.parent.mkdir()
    file.write_text(
        "from loadstone.engine import Engine\n"
        "from loadstone import manager\n"
        "from ..hardware import Device\n"
        "def late():\n    import loadstone.checkpoint.spec\n"
        "if TYPE_CHECKING:\n    from loadstone.planner import Plan\n"
        "from loadstone.config import LoadConfig\nfrom .base import ModelFiles\nimport os, torch\n"
    )
    assert sorted(one.split(":")[0] for one in _violations(file)) == [f"line {line}" for line in (1, 2, 3, 5, 7)]


@pytest.mark.parametrize("vendor", sorted(VENDORS))
def test_vendors_are_known_in_one_file(vendor: str) -> None:
    """A vendor's library is imported in one file, whose name starts with `_` or is the vendor's."""
    files = {str(file.relative_to(ROOT)) for file in FILES for _, name in _imports(file) if _is_of(name, vendor)}
    files -= {file for excused, file in EXCUSED if excused == vendor}
    assert len(files) <= 1, files
    assert all(Path(file).name.startswith("_") or vendor in Path(file).stem for file in files), files


def _is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@each_file
def test_nothing_prints(file: Path) -> None:
    """Only the command line writes to the screen; everything else tells events."""
    if _room(file.relative_to(ROOT).parts) == "cli":
        return
    calls = [node for node in ast.walk(_tree(file)) if isinstance(node, ast.Call)]
    printing = {"print", "sys.stdout.write", "sys.stderr.write"}
    assert not [node.lineno for node in calls if ast.unparse(node.func) in printing]


def _loaded_after(*modules: str) -> set[str]:
    """The packages that a new interpreter has loaded once it imported these modules."""
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_loadstone_loads_nothing_heavy() -> None:
    """`import loadstone` is the standard library and a table of names."""
    assert not _loaded_after("loadstone") & (HEAVY | VENDORS | {"yaml", "rich", "typer", "psutil"})


def test_a_plan_can_be_made_without_torch() -> None:
    """Configuration, sources, facts about files and machine, and the planner know no torch."""
    rooms = ("config", "telemetry", "retry", "sources", "hardware", "planner", "quantization")
    modules = [f"loadstone.{room}" for room in rooms]
    loaded = _loaded_after(*modules, "loadstone.checkpoint.spec", "loadstone.checkpoint.architectures")
    assert not loaded & (HEAVY - {"pydantic"} | VENDORS)


def test_public_names_are_these() -> None:
    """What others build on changes on purpose only."""
    assert loadstone.__all__ == PUBLIC
    assert dir(loadstone) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_there(name: str) -> None:
    """Each public name leads to the thing of that name."""
    assert getattr(loadstone, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="loadston"):
        _ = loadstone.load_qwen  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "found"), [(None, "3000"), ("77", "77")])
def test_the_spinning_of_openmp_is_bounded_unless_the_user_said_how(given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"GOMP_SPINCOUNT": given} if given else {}
    script = "import loadstone, os; print(os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
