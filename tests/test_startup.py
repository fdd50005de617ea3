"""What a load brings in and what it leaves out, and that what runs beside it fails and ends as if it ran within."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from loadstone import CheckpointError, ModelManager
from loadstone.startup import importing_torch, in_background, uncollected
from small_model import write_small_model

# What this package can do without for a model in a folder, and what torch brings only for those who compile.
NOT_NEEDED = {
    "bitsandbytes", "gguf", "hf_xet", "httpx", "huggingface_hub", "rich", "sympy", "transformers", "yaml",
    "torch._dynamo", "torch._inductor",
}  # fmt: skip

ANSWERS = """
import sys
from loadstone import ModelManager
for strategy in sys.argv[2:]:
    with ModelManager({"model_config": {"base_model": sys.argv[1], "quantization": strategy}}) as manager:
        manager.load()
        manager.generate("Hi", max_new_tokens=2)
        print(*sys.modules)
"""
STRATEGIES = ["none", "8bit", "4bit"]

LOAD = """
import sys
from loadstone import ModelLoadError, ModelManager
try:
    ModelManager({"model_config": {"base_model": sys.argv[1]}}).load()
except ModelLoadError as error:
    print(error)
"""


def _python(script: str, *arguments: str, path: Path | None = None) -> str:
    """What a new interpreter prints; `path` is where it looks for modules first."""
    places = [*([str(path)] if path else []), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def _helpers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loadstone-startup")]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What one process has imported after an answer with each strategy."""
    folder = write_small_model(tmp_path_factory.mktemp("libraries") / "small-model")
    said = _python(ANSWERS, str(folder), *STRATEGIES).splitlines()
    return {strategy: set(line.split()) for strategy, line in zip(STRATEGIES, said, strict=True)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_answer_from_a_folder_needs_few_libraries(libraries: dict[str, set[str]], strategy: str) -> None:
    """From start to first token nothing is imported for GPUs, for hubs, or for compiling models."""
    loaded = libraries[strategy]
    assert not loaded & NOT_NEEDED
    assert "torch" in loaded


def test_a_manager_is_made_without_torch() -> None:
    """Whoever makes a manager has loaded nothing yet: torch, tokenizers and kernels come with the load."""
    script = "import sys; from loadstone import ModelManager; ModelManager({}); print(*sys.modules)"
    assert not set(_python(script).split()) & {"torch", "numpy", "tokenizers", "jinja2", "llvmlite", "yaml"}


def test_a_torch_that_cannot_be_imported_is_told_by_the_load(small_model: Path, tmp_path: Path) -> None:
    """The error of the thread that imports it is the load's."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('half of it is missing')")
    assert "ImportError: half of it is missing" in _python(LOAD, str(small_model), path=tmp_path)


def test_a_failed_load_leaves_no_thread(small_model: Path) -> None:
    """What is wrong with the files is told as ever, and nothing goes on being imported behind it."""
    (small_model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        ModelManager({"model_config": {"base_model": str(small_model)}}).load()
    assert not _helpers()


def test_what_runs_in_background_runs_beside() -> None:
    go_on = threading.Event()
    with in_background(lambda: go_on.wait(60)) as later:
        go_on.set()
        assert later()


def test_an_error_in_background_is_raised_where_it_is_waited_for() -> None:
    """It is the same error, each time that it is asked for, and not before."""
    error = ValueError("no")

    def fail() -> None:
        raise error

    with in_background(fail) as later:
        for _ in range(2):
            with pytest.raises(ValueError) as raised:
                later()
            assert raised.value is error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_no_thread(error: type[BaseException]) -> None:
    """It waits for the thread, and its own error is the one that counts."""
    ended: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(60)
        ended.append(1)
        raise OSError

    def block() -> None:
        with in_background(work):
            begun.wait(60)
            threading.Timer(0.05, go_on.set).start()
            raise error

    with pytest.raises(error):
        block()
    assert ended
    assert not _helpers()


def test_torch_is_imported_once() -> None:
    for _ in range(2):
        with importing_torch() as torch_is_there:
            torch_is_there()
        assert sys.modules["torch"] is torch


@pytest.fixture
def nothing_frozen() -> None:
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_left_as_it_was(is_on: bool) -> None:
    """Off stays off and on comes back, also after an error; what was made counts as old."""
    made: list[list[int]] = []

    def block() -> None:
        with uncollected():
            assert not gc.isenabled()
            made.extend([] for _ in range(10_000))
            raise ValueError

    (gc.enable if is_on else gc.disable)()
    try:
        with pytest.raises(ValueError):
            block()
        assert gc.isenabled() is is_on
        assert gc.get_count()[0] < len(made)
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with uncollected():
            pass
        assert gc.get_freeze_count() > frozen // 2 > 0  # a few may be freed, which is no thawing
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_garbage_that_was_not_looked_for_is_still_found() -> None:
    class Knot:
        pass

    with uncollected():
        knot = Knot()
        knot.self = knot  # type: ignore[attr-defined]
        seen = weakref.ref(knot)
        del knot
        assert seen() is not None
    gc.collect()
    assert seen() is None
