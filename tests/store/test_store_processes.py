"""The store between processes, and when they are killed, interrupted, or have nowhere to write."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loads
import pytest
import tiny
import torch

from loadstone.checkpoint.disk import FileReader
from loadstone.store import Store
from loadstone.telemetry import Event, subscribe

PATIENCE = 120
TESTS = Path(__file__).parents[1]
PATHS = [str(TESTS / "store"), str(TESTS / "model"), str(TESTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("processes") / "model", "qwen2", torch.bfloat16)


@pytest.fixture(scope="module")
def answer(folder: Path) -> str:
    return loads.answer(loads.load(folder, None))


def is_clean(store: Store) -> bool:
    """Tell whether the store has one whole entry and nothing half done."""
    (entry,) = store.entries()
    drafts = list((store.folder / "drafts").glob("*"))
    return store.verify(entry) is None and not drafts and not store.damaged()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_start_together_quantise_once_and_all_answer(
    count: int, folder: Path, answer: str, store: Store
) -> None:
    processes = [loads.Started(folder, store.folder) for _ in range(count)]
    assert {process.answer(PATIENCE) for process in processes} == {answer}
    assert {process.end(PATIENCE) for process in processes} == {0}
    assert is_clean(store)


MOMENTS = [
    ("pwrite", 1), ("pwrite", 9), ("pwrite", 20), ("fsync", 1), ("fsync", 2), ("fsync", 4), ("rename", 1), ("fsync", 5),
]  # fmt: skip


@pytest.mark.parametrize(("call", "count"), MOMENTS, ids=[f"{call} {count}" for call, count in MOMENTS])
def test_a_process_killed_at_any_moment_leaves_no_half_entry(
    call: str, count: int, folder: Path, answer: str, store: Store
) -> None:
    """Among them: in the middle of a write, before and after each step of giving the entry its name."""
    assert loads.Started(folder, store.folder, call, count).end(PATIENCE) == -signal.SIGKILL
    assert len(store.entries()) == (1 if (call, count) == ("fsync", 5) else 0)
    assert loads.answer(loads.load(folder, store)) == answer
    assert is_clean(store)


def test_everything_is_on_the_disk_before_it_has_a_name(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power can leave: the order of synchronising and renaming, as the system was asked for it."""
    asked: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(file: int) -> None:
        asked.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")
        fsync(file)

    def noted_rename(source: Path, target: Path) -> None:
        asked.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    loads.load(folder, store)
    draft = asked[3].removeprefix("sync ")
    assert asked == [
        "sync weights.safetensors",
        "sync manifest.json",
        "sync used",
        f"sync {draft}",
        "rename",
        "sync entries",
    ]


def test_processes_share_the_memory_of_an_entry(folder: Path, store: Store) -> None:
    """Two decoders in two processes: the pages are those of the page cache, and nobody's own."""
    for _ in range(2):
        decoder = loads.load(folder, store)
        loads.answer(decoder)  # the second is attached
    script = f"""
import sys
sys.path[:0] = {PATHS!r}
import loads
from pathlib import Path
from loadstone.store import Store
decoder = loads.load(Path({str(folder)!r}), Store(Path({str(store.folder)!r})))
loads.answer(decoder)
at = [part for part in open("/proc/self/smaps").read().split("VmFlags") if "weights.safetensors" in part][0]
print({{line.split(":")[0]: int(line.split()[1]) for line in at.splitlines() if line.endswith(" kB")}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    sizes = ast.literal_eval(done.stdout)
    assert sizes["Shared_Clean"] > 0
    assert sizes["Private_Dirty"] == sizes["Anonymous"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("something else")])
@pytest.mark.parametrize("step", [1, 12, 30])
def test_a_load_that_is_interrupted_leaves_nothing(
    error: BaseException, step: int, folder: Path, answer: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = FileReader.read, []

    def interrupted(*arguments: object) -> torch.Tensor:
        seen.append(arguments)
        if len(seen) == step:
            raise error
        return read(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FileReader, "read", interrupted)
        with pytest.raises(type(error)):
            loads.load(folder, store)
    assert not store.entries()
    assert not list((store.folder / "drafts").glob("*"))
    assert loads.answer(loads.load(folder, store)) == answer


# -- nowhere to write -------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    seen: list[str] = []

    def note(event: Event) -> None:
        if event.name == "store.warning":
            seen.append(event.fields["reason"])

    unsubscribe = subscribe(note)
    yield seen
    unsubscribe()


def test_a_store_that_cannot_be_made_is_done_without(
    folder: Path, answer: str, tmp_path: Path, warnings: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert loads.answer(loads.load(folder, Store(tmp_path / "file" / "store"))) == answer
    assert len(warnings) == 1
    assert "cannot be written" in warnings[0]


def test_a_disk_that_is_full_is_done_without(
    folder: Path, answer: str, store: Store, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, when room is taken, and in the middle, when it is not there after all."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert loads.answer(loads.load(folder, store)) == answer
    calls: list[object] = []
    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *given: calls.append(given) or (full() if len(calls) > 5 else write(*given)))
        assert loads.answer(loads.load(folder, store)) == answer
    assert len(warnings) == 2
    assert all("No space left" in warning for warning in warnings)
    assert not list((store.folder / "drafts").glob("*"))
    assert loads.answer(loads.load(folder, store)) == answer
    assert is_clean(store)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "loadstone-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_disk_that_is_too_small_is_done_without(
    folder: Path, answer: str, small_disk: Path, warnings: list[str]
) -> None:
    store = Store(small_disk / "store")
    (small_disk / "filler").write_bytes(bytes(950_000))
    assert loads.answer(loads.load(folder, store)) == answer
    assert len(warnings) == 1
    assert not list((store.folder / "drafts").glob("*"))
    (small_disk / "filler").unlink()
    assert loads.answer(loads.load(folder, store)) == answer
    assert is_clean(store)


@pytest.mark.parametrize("has_entry", [True, False])
def test_a_store_that_may_only_be_read_is_read(
    has_entry: bool, folder: Path, answer: str, small_disk: Path, warnings: list[str]
) -> None:
    """An entry in it is used; where there is none, the load goes on without."""
    store = Store(small_disk / "store")
    if has_entry:
        time.sleep(0.15)  # a change of the checkpoint would show from now on
        loads.load(folder, store).release()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert loads.answer(loads.load(folder, store)) == answer
    assert len(warnings) == (0 if has_entry else 1)
    assert all("Read-only" in warning for warning in warnings)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_rounds_of_loads_leave_memory_flat(folder: Path, tmp_path: Path) -> None:
    """Fifty loads and unloads grow the process by less than a megabyte a round, measured from the fifth on."""
    script = f"""
import gc, json, sys
sys.path[:0] = {PATHS!r}
import loads
from pathlib import Path
from loadstone.hardware import process_rss
from loadstone.memory import give_back
from loadstone.store import Store
store, sizes = Store(Path({str(tmp_path / "store")!r})), []
for _ in range(50):
    decoder = loads.load(Path({str(folder)!r}), store)
    loads.answer(decoder)
    decoder.release()
    give_back()
    sizes.append(process_rss())
    if not gc.get_freeze_count():
        gc.freeze()  # what is there after the first round stays, and need not be looked through in all others
print(json.dumps(sizes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True
    )  # fmt: skip
    sizes = json.loads(done.stdout)
    assert (sizes[-1] - sizes[4]) / 45 < 1_000_000
