"""Memory comes back: what an unload says of it is so, and what is still held is told with who holds it."""

from __future__ import annotations

import gc
import re
import statistics
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lives import PATIENCE, config_of

from loadstone import MemoryReport, ModelManager
from loadstone.hardware import process_rss, resident_bytes
from loadstone.life import Footprint
from loadstone.loaded import LoadedModel

STAYS = 100_000_000  # bytes of libraries, kernels and tokenizer that may stay after a first load
A_ROUND = 1_000_000  # bytes that each of many loads may leave

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages a process has")
kept: list[object] = []  # what a test holds in a module's variable


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    kept.clear()


@pytest.fixture
def roomy(small_model: Path) -> Iterator[ModelManager]:
    """A manager whose weights are in the store, and whose KV cache has 16 MB when it is full; not loaded."""
    config = config_of(small_model, context=4096, streams=8)
    with ModelManager(config) as first:
        first.load()
    with ModelManager(config) as manager:
        yield manager


def _largest(model: LoadedModel) -> torch.Tensor:
    return max((tensor for _, tensor in model.decoder.tensors()), key=lambda tensor: tensor.nbytes)


def _run(script: str, *arguments: str) -> list[int]:
    """Run a script in a new interpreter and return the numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


# -- the receipt ------------------------------------------------------------------------------------------------------


def test_a_receipt_says_what_came_back(roomy: ModelManager) -> None:
    """Bytes by kind before and after; they make up what the process has."""
    roomy.load()
    roomy.generate("word " * 200)
    receipt = roomy.unload_model()
    assert receipt.before.store_pages > 100_000
    assert receipt.before.kv_cache > 100_000
    before, after = receipt.before, receipt.after
    assert before.weights == after.weights == after.store_pages == after.kv_cache == 0
    assert before.store_pages + before.kv_cache + before.other == before.resident
    assert (receipt.held, receipt.held_bytes) == ((), 0)
    assert receipt.freed.kv_cache == before.kv_cache
    assert receipt.seconds > 0


def test_weights_that_were_just_made_are_the_process_own(manager: ModelManager) -> None:
    """A first load multiplies what it quantised, and not the store's file."""
    manager.load()
    before = manager.unload_model().before
    assert before.weights > 100_000
    assert before.store_pages == 0


def test_a_receipt_is_a_paragraph_for_people(manager: ModelManager) -> None:
    manager.load()
    text = str(manager.unload_model())
    assert re.fullmatch(
        r"small-model was unloaded in [0-9.]+ s: resident memory went from .* to .* \(.*\)\. "
        r"Nobody holds any of it\.",
        text,
    )


def test_a_receipt_of_nothing_is_zeros(manager: ModelManager) -> None:
    receipt = manager.unload_model()
    assert (receipt.model, receipt.freed, receipt.held, receipt.seconds) == (None, Footprint(), (), 0.0)
    assert "No model was loaded" in str(receipt)


def test_a_receipt_does_not_change(manager: ModelManager) -> None:
    with pytest.raises(FrozenInstanceError):
        manager.unload_model().model = "another"  # type: ignore[misc]


# -- what is held, and by whom ----------------------------------------------------------------------------------------


def test_a_variable_that_has_the_model_is_named(manager: ModelManager) -> None:
    """The model is emptied, so that it costs nothing."""
    mine = manager.load()
    (held,) = manager.unload_model().held
    assert (held.name, held.nbytes) == ("LoadedModel", 0)
    assert "variable 'mine' of test_a_variable_that_has_the_model_is_named()" in " ".join(held.by)
    assert mine.plan.strategy == "4bit"


def test_a_tensor_that_somebody_has_is_named_with_its_bytes(manager: ModelManager) -> None:
    """By a module's variable, through a list."""
    shelf = ModuleType("shelf")  # one of now, since the collector does not look at what was frozen before
    exec("kept = []", vars(shelf))
    model = manager.load()
    shelf.kept.append(_largest(model))
    size = _largest(model).nbytes
    del model
    receipt = manager.unload_model()
    (held,) = receipt.held
    assert held.nbytes == receipt.held_bytes == size > 10_000
    assert held.by == ("a list, held by variable 'kept' of module shelf",)
    assert held.name in ("embedding", "lm_head", "layers.0.gate_up", "layers.1.gate_up")
    assert "Still held: " in str(receipt)


class Service:
    """Somebody's object."""

    weight: object


def test_an_attribute_that_has_a_part_is_named(manager: ModelManager) -> None:
    service = Service()
    service.weight = manager.load().decoder.layers[1].down.weight
    receipt = manager.unload_model()
    assert all(one.name == "layers.1.down" for one in receipt.held)
    said = receipt.held[0].by[0]
    assert f"attribute 'weight' of a {__name__}.Service, held by variable 'service' of test_an_attribute" in said


def test_a_view_keeps_the_whole_tensor_and_is_found(manager: ModelManager) -> None:
    mine = {"one number": _largest(manager.load()).flatten()[:1]}
    (held,) = manager.unload_model().held
    assert held.nbytes > 10_000
    assert "item 'one number' of a dict, held by variable 'mine' of test_a_view" in held.by[0]
    del mine


def test_a_closure_is_named(manager: ModelManager) -> None:
    tensor = _largest(manager.load())

    def size() -> int:
        return tensor.nbytes

    kept.append(size)
    (held,) = manager.unload_model().held
    assert any("test_a_closure_is_named" in by for by in held.by)
    assert size() == held.nbytes


def test_what_python_cannot_see_is_unknown(manager: ModelManager) -> None:
    """NumPy's arrays do not tell what they refer to."""
    mine = _largest(manager.load()).numpy()
    (held,) = manager.unload_model().held
    assert held.by[0].startswith("unknown")
    assert held.nbytes == mine.nbytes


def test_many_things_are_told_in_one_sum(manager: ModelManager) -> None:
    """All bytes are counted, and only a few names are looked for."""
    model = manager.load()
    kept.extend(tensor for _, tensor in model.decoder.tensors())
    size = sum(tensor.nbytes for tensor in kept)  # type: ignore[attr-defined]
    del model
    receipt = manager.unload_model()
    assert receipt.held_bytes == size
    assert len(receipt.held) == 5
    assert "not looked for" in receipt.held[-1].by[0]


def test_looking_for_holders_holds_nothing(manager: ModelManager) -> None:
    """Neither the receipt nor the looking keeps what it found: in a function's variable, dropped later, or a list."""
    tensor = _largest(manager.load())
    alive = weakref.ref(tensor)
    kept.append(tensor)
    receipt = manager.unload_model()
    assert receipt.held_bytes == tensor.nbytes
    del tensor
    kept.clear()
    gc.collect()
    assert alive() is None


def test_looking_for_holders_leaves_locals_alone(manager: ModelManager) -> None:
    """What a caller asked of its own variables it still has afterwards."""
    mine = manager.load()
    mapping = locals()
    assert "mine" in " ".join(manager.unload_model().held[0].by)
    assert mapping["mine"] is mine


# -- the system's figures ---------------------------------------------------------------------------------------------

_ONE_LIFE = """
import torch
from loadstone import ModelManager
from loadstone.hardware import process_rss
manager = ModelManager({'model_config': {'base_model': 'smollm2'}})
before = process_rss()
held = manager.load()
manager.generate('Tell me about bonds. ' * 40, max_new_tokens=8)
loaded = process_rss()
print(before, loaded, manager.unload_model().after.resident, process_rss())
"""


@on_linux
def test_after_an_unload_a_process_has_little_more_than_before_the_load() -> None:
    """With the bundled model in a fresh process, though the caller still has what the load returned."""
    before, loaded, told, after = _run(_ONE_LIFE)
    assert loaded - before > STAYS
    assert after - before < STAYS
    assert abs(told - after) < 5_000_000


_ROUNDS = """
import gc, sys
from loadstone import ModelManager
from loadstone.hardware import process_rss
manager = ModelManager({'model_config': {'base_model': sys.argv[1], 'context': 512}})
for _ in range(int(sys.argv[2])):
    manager.load()
    manager.generate('Hi', max_new_tokens=4)
    print(manager.unload_model().after.resident)
    if not gc.get_freeze_count():
        gc.freeze()  # what is there after the first round stays, and need not be looked through in all others
"""


@on_linux
def test_many_loads_leave_no_more_than_few(small_model: Path) -> None:
    """By least squares over rounds of load, answer and unload in one process."""
    sizes = _run(_ROUNDS, str(small_model), "25")[5:]
    assert statistics.linear_regression(range(len(sizes)), sizes).slope < A_ROUND


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_keeps_nothing(small_model: Path) -> None:
    with ModelManager(config_of(small_model, device="cuda")) as manager:
        manager.load()
        manager.generate("Hi")
        receipt = manager.unload_model()
    assert receipt.before.device_allocated > 0
    assert (receipt.after.device_allocated, receipt.after.device_reserved) == (0, 0)


# -- between answers --------------------------------------------------------------------------------------------------


@on_linux
def test_the_kv_cache_that_was_touched_comes_back(roomy: ModelManager) -> None:
    """Resident memory falls by what the step says, and that is most of what the cache had."""
    roomy.load()
    roomy.generate_batch(["word " * 600 + str(number) for number in range(8)], max_new_tokens=2)
    cache = roomy.load().engine.cache
    assert cache is not None
    touched = resident_bytes((one.data_ptr(), one.nbytes) for one in (cache.keys, cache.values))
    assert touched is not None
    assert touched > 1_000_000
    del cache
    before = process_rss()
    report = roomy.optimize_memory()
    assert report.steps["kv_cache"] > 0.9 * touched
    assert before - process_rss() > 0.9 * touched
    assert report["before"] - report["after"] == pytest.approx(report.freed, abs=2_000_000)


@on_linux
def test_pages_of_the_store_go_and_come_back(roomy: ModelManager) -> None:
    """The weights leave the process, and the next answer is what it was."""
    model = roomy.load()
    said = str(roomy.generate("Hi"))
    places = [(tensor.data_ptr(), tensor.nbytes) for _, tensor in model.decoder.tensors()]
    assert resident_bytes(places) == pytest.approx(sum(size for _, size in places), rel=0.3)
    assert roomy.optimize_memory().steps["store_pages"] > 100_000
    assert resident_bytes(places) == 0
    assert str(roomy.generate("Hi")) == said


def test_clearing_the_cache_leaves_the_weights(roomy: ModelManager) -> None:
    """It costs the next answer no read of them."""
    model = roomy.load()
    roomy.generate("Hi")
    places = [(tensor.data_ptr(), tensor.nbytes) for _, tensor in model.decoder.tensors()]
    before = resident_bytes(places)
    assert roomy.clear_cache() >= 0
    assert resident_bytes(places) == before


def test_what_was_remembered_of_prompts_is_forgotten(manager: ModelManager) -> None:
    manager.load()
    prompt = "word " * 50
    manager.generate(prompt)
    assert manager.generate(prompt).usage.cached_tokens > 0
    manager.clear_cache()
    assert manager.generate(prompt).usage.cached_tokens == 0


def test_while_an_answer_is_made_its_cache_stays(manager: ModelManager) -> None:
    """The report says so, and the answer is whole."""
    manager.load()
    stream = manager.stream("Hi", max_new_tokens=1000)
    next(stream)
    report = manager.optimize_memory()
    assert report.is_busy
    assert report.steps["kv_cache"] < 1_000_000
    assert "answers are under way" in str(report)
    for _ in stream:
        pass
    assert stream.result.usage.completion_tokens == 1000


def test_a_report_is_a_mapping_that_does_not_change(manager: ModelManager) -> None:
    report = manager.optimize_memory()
    assert isinstance(report, MemoryReport)
    assert {"before", "after", "garbage", "allocators"} <= set(report)
    assert report.freed == sum(size for name, size in report.items() if name not in ("before", "after"))
    with pytest.raises(FrozenInstanceError):
        report.before = 0  # type: ignore[misc]
