"""A first load answers while what it quantised is written, and leaves nothing half done when that is not waited for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import loads
import pytest
import tiny
import torch

from loadstone.checkpoint import inspect
from loadstone.config import LoadConfig
from loadstone.model import Decoder, build
from loadstone.planner import plan
from loadstone.sources import resolve
from loadstone.store import Draft, Store
from loadstone.telemetry import Event


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model", "llama", torch.bfloat16)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written into a draft before this is set."""
    is_open, put = threading.Event(), Draft.put

    def waiting(draft: Draft, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        assert is_open.wait(60)
        put(draft, number, tensors)

    monkeypatch.setattr(Draft, "put", waiting)
    yield is_open
    is_open.set()


def started(folder: Path, store: Store) -> Decoder:
    """Load, and do not wait until it is kept."""
    spec = inspect(resolve(str(folder)))
    wish = LoadConfig(base_model=str(folder), quantization="4bit", context=64)
    return build(plan(wish, spec, loads.CPU, loads.SETTINGS, runtime_bytes=0, resident_bytes=0), spec, store)


def test_a_first_load_answers_before_it_is_kept(folder: Path, store: Store, gate: threading.Event) -> None:
    decoder = started(folder, store)
    assert loads.answer(decoder) == loads.answer(loads.load(folder, None))
    assert decoder.entry is None
    assert store.entries() == []
    gate.set()
    decoder.settle()
    assert decoder.entry == store.entries()[0]


def test_a_decoder_is_the_same_before_it_is_kept_and_after(folder: Path, store: Store, gate: threading.Event) -> None:
    """What it answered after a first load can be used after a later one."""
    decoder = started(folder, store)
    threading.Timer(0.2, gate.set).start()
    before = decoder.identity()
    decoder.settle()
    assert before == decoder.identity() == started(folder, store).identity()


def test_writing_tells_how_far_it_is(
    folder: Path, store: Store, gate: threading.Event, events: list[Event]
) -> None:  # fmt: skip
    decoder = started(folder, store)
    assert not decoder.is_settled
    gate.set()
    decoder.settle()
    assert decoder.is_settled
    told = [event.fields for event in events if event.name == "store.writing"]
    assert [fields["tensors_done"] for fields in told] == [*range(1, told[-1]["tensors"] + 1)]
    assert told[-1]["done"] == told[-1]["total"] == sum(decoder.weight_bytes().values())


def test_a_decoder_that_is_released_is_kept_first(folder: Path, store: Store, gate: threading.Event) -> None:
    decoder = started(folder, store)
    threading.Timer(0.2, gate.set).start()
    decoder.release()
    assert len(store.entries()) == 1


def test_a_decoder_that_nobody_holds_is_kept_all_the_same(folder: Path, store: Store, gate: threading.Event) -> None:
    publishing = started(folder, store).publishing
    assert publishing is not None
    gate.set()
    publishing.finish()
    assert len(store.entries()) == 1


def test_an_interrupt_while_waiting_leaves_nothing(folder: Path, store: Store, gate: threading.Event) -> None:
    decoder = started(folder, store)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    threading.Timer(0.4, gate.set).start()
    with pytest.raises(KeyboardInterrupt):
        decoder.release()
    assert store.entries() == []
    assert not list((store.folder / "drafts").iterdir())
    assert vars(decoder) == {}
    assert loads.load(folder, store).entry == store.entries()[0]


def test_a_second_load_waits_for_the_first_to_be_kept(folder: Path, store: Store, gate: threading.Event) -> None:
    first = started(folder, store)
    threading.Timer(0.2, gate.set).start()
    second = started(folder, store)
    assert second.attached is not None
    assert first.entry == second.entry
