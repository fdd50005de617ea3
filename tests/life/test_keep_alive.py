"""A model that nobody asks anything goes by itself, and is back when somebody does."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lives import PATIENCE, Wait, config_of

from loadstone import ConfigurationError, Event, GenerationError, ModelManager, ModelNotLoadedError
from loadstone.config import EngineConfig

SOON = 0.05  # seconds
THREAD = "loadstone-keep-alive"


@pytest.fixture
def brief(small_model: Path) -> Iterator[ModelManager]:
    """A manager whose model goes soon."""
    with ModelManager(config_of(small_model, engine={"keep_alive": SOON})) as manager:
        yield manager


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (300, 300), (0, 0), (0.5, 0.5), ("300", 300), ("90s", 90), ("5m", 300), ("5min", 300), ("2 h", 7200),
        ("0", 0), ("forever", None), ("Forever", None), (-1, None), ("-1", None), (None, None),
    ],
)  # fmt: skip
def test_how_long_a_model_stays_is_written_in_many_ways(said: Any, seconds: float | None) -> None:
    assert EngineConfig(keep_alive=said).keep_alive == seconds


@pytest.mark.parametrize("said", [-2, "-5m", "5 moons", "", "m", True, float("inf"), 10**400, "9" * 400, [5]])
def test_other_durations_are_refused(said: Any) -> None:
    with pytest.raises(ConfigurationError, match="keep_alive") as caught:
        EngineConfig(keep_alive=said)
    assert caught.value.key == "keep_alive"


def test_an_environment_variable_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_ENGINE__KEEP_ALIVE", "5m")
    assert ModelManager({}).config.config.engine.keep_alive == 300


def test_an_idle_model_goes(brief: ModelManager, heard: Wait) -> None:
    """The reason is told, and nobody thinks that the model is there."""
    brief.load()
    assert heard("unload").fields["reason"] == f"idle for {SOON} s"
    assert not brief.is_loaded()
    with pytest.raises(ModelNotLoadedError, match="keep_alive"):
        brief.get_model_info()


def test_who_kept_a_model_that_went_is_told_whom_to_ask(brief: ModelManager, heard: Wait) -> None:
    model = brief.load()
    heard("unload")
    with pytest.raises(GenerationError, match=r"unloaded.*\n.*manager\.generate") as caught:
        model.generate("Hi")
    assert "idle" in (caught.value.hint or "")


@pytest.mark.parametrize("ask", ["generate", "stream", "generate_batch"])
def test_the_next_request_brings_it_back(brief: ModelManager, heard: Wait, ask: str) -> None:
    """Its weights come from the store, and its answer is the same."""
    brief.load()
    before = str(brief.generate("Hi"))
    heard("unload")
    said = getattr(brief, ask)(["Hi"] if ask == "generate_batch" else "Hi")
    assert "".join(map(str, [said] if ask == "generate" else said)) == before
    heard("store.hit")
    assert "request" in heard("reload").fields["reason"]


def test_many_requests_at_once_bring_it_back_once(small_model: Path, heard: Wait, events: list[Event]) -> None:
    with ModelManager(config_of(small_model, engine={"keep_alive": 0})) as manager:
        manager.load()
        manager.generate("Hi")
        heard("unload")
        begin = threading.Barrier(6)

        def ask(_: int) -> str:
            begin.wait(PATIENCE)
            return str(manager.generate("Hi", max_new_tokens=300))

        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(ask, range(6)))) == 1
    assert [event.name for event in events].count("load.build") == 2


def test_a_model_in_use_stays(brief: ModelManager) -> None:
    """An answer that takes longer than the model would stay does not find it on its way out."""
    brief.load()
    stream = brief.stream("Hi", max_new_tokens=4000)
    next(stream)
    assert not threading.Event().wait(3 * SOON)
    assert brief.is_loaded()
    stream.cancel()
    assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"


def test_a_call_has_the_model_until_its_end(brief: ModelManager, heard: Wait) -> None:
    """What a call does between having the model and asking it takes as long as it takes."""
    brief.load()
    with brief._life.lease() as model:
        assert not threading.Event().wait(3 * SOON)
        assert brief.is_loaded()
        model.generate("Hi")
    heard("unload")


def test_zero_lets_the_model_go_after_an_answer_and_not_before_the_first(small_model: Path, heard: Wait) -> None:
    with ModelManager(config_of(small_model, engine={"keep_alive": 0})) as manager:
        manager.load()
        assert not threading.Event().wait(SOON)
        assert manager.is_loaded()
        for times in (1, 2):
            manager.generate("Hi")
            heard("unload", times=times)
            assert not manager.is_loaded()


def test_a_stream_that_nobody_holds_does_not_keep_the_model(brief: ModelManager, heard: Wait) -> None:
    """It was neither read to its end nor closed."""
    brief.load()
    next(brief.stream("Hi", max_new_tokens=4000))
    gc.collect()
    assert heard("unload").fields["ok"]


def test_a_stream_that_nobody_reads_does_not_keep_the_model(brief: ModelManager, heard: Wait) -> None:
    """What was made for it can be read when the model is gone."""
    brief.load()
    stream = brief.stream("Hi", max_new_tokens=50)
    heard("unload")
    assert "".join(map(str, stream))
    assert stream.result.usage.completion_tokens == 50


def test_a_model_that_was_unloaded_does_not_come_back_by_itself(brief: ModelManager) -> None:
    brief.load()
    brief.unload_model()
    with pytest.raises(ModelNotLoadedError, match=r"load\(\)"):
        brief.generate("Hi")


def test_unloading_what_has_gone_already_is_nothing(brief: ModelManager, heard: Wait) -> None:
    """And it says that the model is not to come back."""
    brief.load()
    heard("unload")
    assert brief.unload_model().model is None
    with pytest.raises(ModelNotLoadedError, match=r"load\(\)"):
        brief.generate("Hi")


def test_a_model_that_stays_for_ever_has_no_thread_for_it(manager: ModelManager) -> None:
    before = _threads()
    manager.load()
    assert _threads() == before


def test_the_thread_ends_with_the_model(small_model: Path) -> None:
    before = set(_threads())
    with ModelManager(config_of(small_model, engine={"keep_alive": "1h"})) as manager:
        for _ in range(2):
            manager.reload_model()
        (thread,) = (one for one in _threads() if one not in before and one.is_alive())
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_thread_keeps_no_manager(small_model: Path) -> None:
    """One that nobody holds goes with its model, long before that is due."""
    before = set(_threads())
    manager = ModelManager(config_of(small_model, engine={"keep_alive": "1h"}))
    manager.load()
    manager.generate("Hi")
    (thread,) = (one for one in _threads() if one not in before)
    life = weakref.ref(manager._life)
    del manager
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert life() is None


@pytest.mark.parametrize("keep_alive", ["1h", "0"])
def test_a_program_ends_as_if_there_were_no_thread(small_model: Path, keep_alive: str) -> None:
    """Whether it waits or is just letting the model go."""
    script = (
        "import sys\nfrom loadstone import ModelManager\n"
        "manager = ModelManager({'model_config': {'base_model': sys.argv[1]}, 'engine': {'keep_alive': sys.argv[2]}})\n"
        "manager.load()\nmanager.generate('Hi', max_new_tokens=2)\nprint('end')\n"
    )
    command = [sys.executable, "-c", script, str(small_model), keep_alive]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
