"""A reload puts another model in the place of one, or leaves everything as it was."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lives import PATIENCE, config_of

from loadstone import (
    ConfigManager,
    ConfigurationError,
    Event,
    ModelLoadError,
    ModelManager,
    ModelNotLoadedError,
    ResourceError,
)
from loadstone.checkpoint.weights import Weights
from loadstone.life import Loading, life

CONTEXT = 256


@pytest.fixture
def tight(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelManager]:
    """A manager that is told of no room for two models; loaded, and its weights are stored."""
    monkeypatch.setattr(life, "_fit_together", lambda *_: False)  # models this small would fit ten times
    with ModelManager(config_of(small_model, context=CONTEXT)) as manager:
        manager.load()
        yield manager


def _of(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event.name == name]


def _failing(*_: Any) -> torch.Tensor:
    raise OSError(5, "Input/output error")


# -- what is wanted ---------------------------------------------------------------------------------------------------


def test_a_setting_changes_with_a_reload_and_stays(manager: ModelManager) -> None:
    """By its name alone, by a section's, and by both; the next reload keeps it."""
    manager.load()
    manager.reload_model(quantization="8bit", generation={"top_k": 3})
    manager.reload_model()
    info = manager.get_model_info()
    assert info["strategy"] == "8bit"
    assert info["sampling"]["top_k"] == {"value": 3, "from": "argument"}
    assert manager.config.config.model.quantization == "8bit"


def test_a_setting_that_nobody_knows_is_refused_with_the_nearest(manager: ModelManager) -> None:
    with pytest.raises(ConfigurationError, match="quantization"):
        manager.reload_model(quantisation="8bit")


def test_another_configuration_takes_the_place_of_all(manager: ModelManager, small_model: Path) -> None:
    manager.load()
    manager.reload_model(quantization="8bit")
    manager.reload_model(config_of(small_model, context=CONTEXT))
    assert manager.get_model_info()["strategy"] == "4bit"
    assert manager.get_model_info()["context"] == CONTEXT


def test_the_configuration_file_is_read_again(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was found, though the working directory is another one by now."""
    file = tmp_path / "here" / "loadstone.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(config_of(small_model)), encoding="utf-8")
    monkeypatch.chdir(file.parent)
    with ModelManager() as manager:
        manager.load()
        file.write_text(yaml.safe_dump(config_of(small_model, context=CONTEXT)), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        manager.reload_model()
        assert manager.get_model_info()["context"] == CONTEXT
        assert manager.config.files == (file,)


def test_a_mistake_in_the_file_leaves_the_model_as_it_is(small_model: Path, tmp_path: Path) -> None:
    """And says where it is."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config_of(small_model)), encoding="utf-8")
    with ModelManager(file) as manager:
        model = manager.load()
        file.write_text("model_config:\n  device: 7\n", encoding="utf-8")
        with pytest.raises(ConfigurationError, match=r"mine\.yaml:2"):
            manager.reload_model()
        assert manager.load() is model
        assert manager.config.config.model.base_model == str(small_model)


def test_what_the_caller_gave_is_above_a_file_that_is_read_again(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config_of(small_model, context=CONTEXT)), encoding="utf-8")
    said = ConfigManager(file, overrides={"model_config.context": 64})
    file.write_text(yaml.safe_dump(config_of(small_model, context=CONTEXT, streams=2)), encoding="utf-8")
    again = said.read_again().config.model
    assert (again.context, again.streams) == (64, 2)
    assert said.config.model.streams == 1


def test_the_reason_is_logged_and_told(
    manager: ModelManager, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    manager.load()
    with caplog.at_level(logging.INFO, "loadstone"):
        manager.reload_model(reason="a new revision")
    assert [event.fields["reason"] for event in _of(events, "reload")] == ["a new revision"]
    assert [event.fields["reason"] for event in _of(events, "reload.begun")] == ["a new revision"]
    assert any('reason="a new revision"' in record.getMessage() for record in caplog.records)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_memory": "10MB"}, ResourceError),
        ({"quantization": "5bit"}, ConfigurationError),
        ({"base_model": "nowhere/at/all"}, ModelLoadError),
        ({"context": 10**6}, ConfigurationError),
    ],
)
def test_what_cannot_be_loaded_leaves_the_model_running(
    manager: ModelManager, events: list[Event], settings: dict[str, Any], error: type[Exception]
) -> None:
    """A wish, files or a plan that are refused: the old model goes on, and so does its configuration."""
    model = manager.load()
    stream = manager.stream("Hi", max_new_tokens=50)
    before = manager.config
    with pytest.raises(error):
        manager.reload_model(**settings)
    assert manager.load() is model
    assert manager.config is before
    assert not _of(events, "unload")
    assert len(list(stream)) > 1
    assert stream.result.usage.completion_tokens == 50


def test_a_refused_first_load_leaves_the_configuration(manager: ModelManager) -> None:
    before = manager.config
    with pytest.raises(ResourceError):
        manager.reload_model(max_memory="10MB")
    assert manager.config is before
    assert not manager.is_loaded()


# -- side by side -----------------------------------------------------------------------------------------------------


def test_with_room_for_both_the_old_model_answers_until_the_new_one_is_there(
    manager: ModelManager, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = manager.load()
    said = str(manager.generate("Hi"))
    build = Loading.build
    meanwhile = []

    def watched(self: Loading, *rest: Any) -> Any:
        made = build(self, *rest)
        meanwhile.append(str(manager.generate("Hi")))
        assert manager.load() is old
        return made

    monkeypatch.setattr(Loading, "build", watched)
    new = manager.reload_model(quantization="8bit")
    assert meanwhile == [said]
    assert manager.load() is new is not old
    assert [event.fields["beside"] for event in _of(events, "reload")] == [True]


def test_the_old_model_finishes_what_it_has_begun(manager: ModelManager) -> None:
    """And then nothing of it is left."""
    old = manager.load()
    weights = [weakref.ref(tensor) for _, tensor in old.decoder.tensors()]
    stream = manager.stream("Hi", max_new_tokens=200)
    next(stream)
    manager.reload_model(quantization="8bit")
    for _ in stream:
        pass
    assert stream.result.usage.completion_tokens == 200
    gc.collect()
    assert not [one for one in weights if one() is not None]


def test_a_failure_beside_the_old_model_does_not_touch_it(
    manager: ModelManager, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = manager.load()
    monkeypatch.setattr(Weights, "numbers", _failing)
    with pytest.raises(ModelLoadError, match="Input/output"):
        manager.reload_model(quantization="8bit")
    assert manager.load() is old
    assert manager.config.config.model.quantization == "4bit"
    assert not _of(events, "unload")


# -- one after the other ----------------------------------------------------------------------------------------------


def test_without_room_for_both_the_old_model_goes_first(tight: ModelManager, events: list[Event]) -> None:
    tight.reload_model(quantization="8bit")
    (done,) = _of(events, "reload")
    assert done.fields["beside"] is False
    names = [event.name for event in events]
    assert names.index("load.plan") < names.index("unload") < names.index("load.build")
    assert tight.get_model_info()["strategy"] == "8bit"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_model_comes_back_when_the_new_one_fails(
    tight: ModelManager, events: list[Event], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """From the store, without a look at the checkpoint, and with the configuration that it had."""
    before, said = tight.config, str(tight.generate("Hi"))

    def fail(*_: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Weights, "numbers", fail)
    events.clear()
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelLoadError):
        tight.reload_model(quantization="8bit")
    assert tight.config is before
    assert str(tight.generate("Hi")) == said
    assert [event.fields["ok"] for event in _of(events, "reload.undone")] == [True]
    assert len(_of(events, "store.hit")) == len(_of(events, "load.inspect")) == 1


def test_the_old_model_comes_back_though_its_files_are_others_now(
    tight: ModelManager, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was loaded is in the store, and is not looked for in files that were replaced."""
    from safetensors.torch import load_file, save_file

    said = str(tight.generate("Hi"))
    file = small_model / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    monkeypatch.setattr(Weights, "numbers", _failing)
    with pytest.raises(ModelLoadError, match="Input/output"):
        tight.reload_model()
    assert str(tight.generate("Hi")) == said


def test_when_neither_can_be_loaded_the_error_says_so(tight: ModelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded then, and loading may be tried again."""
    with monkeypatch.context() as patch:
        patch.setattr(Loading, "build", _failing)
        with pytest.raises(ModelLoadError, match="Input/output") as caught:
            tight.reload_model(quantization="8bit")
    assert any("before it is gone too" in note for note in caught.value.__notes__)
    with pytest.raises(ModelNotLoadedError, match=r"load\(\)"):
        tight.generate("Hi")
    tight.load()
    assert tight.get_model_info()["strategy"] == "4bit"


def test_requests_that_come_meanwhile_wait(tight: ModelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new model answers them."""
    build = Loading.build
    has_begun, may_end = threading.Event(), threading.Event()

    def held(self: Loading, *rest: Any) -> Any:
        has_begun.set()
        assert may_end.wait(PATIENCE)
        return build(self, *rest)

    monkeypatch.setattr(Loading, "build", held)
    with ThreadPoolExecutor(4) as pool:
        reload = pool.submit(tight.reload_model, quantization="8bit")
        assert has_begun.wait(PATIENCE)
        assert not tight.is_loaded()
        asked = [pool.submit(tight.generate, "Hi") for _ in range(3)]
        assert not threading.Event().wait(0.1)
        assert not any(one.done() for one in asked)
        may_end.set()
        assert len({str(one.result(PATIENCE)) for one in asked}) == 1
        assert reload.result(PATIENCE).plan.strategy == "8bit"


def test_reloading_again_and_again_needs_no_more_memory(tight: ModelManager) -> None:
    """What is there of the runtime already is not counted again: a model that fitted once fits for ever."""
    first = tight.get_model_info()["planned_bytes"]["runtime"]
    for _ in range(5):
        tight.generate("Hi")
        tight.reload_model()
    assert tight.get_model_info()["planned_bytes"]["runtime"] == first


def test_two_models_fit_together_where_their_sum_is_allowed(manager: ModelManager) -> None:
    old = manager.load()
    held = sum(old.bytes.values()) + old.plan.activation_bytes
    enough = old.plan.needed_bytes + held
    assert life._fit_together(replace(old.plan, allowed_bytes=enough), old)
    assert not life._fit_together(replace(old.plan, allowed_bytes=enough - 1), old)
