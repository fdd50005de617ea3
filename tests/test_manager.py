"""The life of a model: configured, loaded once, asked, told about, given back; and what is left when a load fails."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import loadstone.manager
from loadstone import (
    CheckpointError,
    ConfigManager,
    ConfigurationError,
    Event,
    GenerationConfig,
    GenerationError,
    ModelLoadError,
    ModelManager,
    ModelNotLoadedError,
    ResourceError,
    SourceError,
    get_model_manager,
    load_qwen_model,
    subscribe,
)
from loadstone.checkpoint.weights import Weights
from loadstone.config import LoadstoneConfig
from loadstone.loaded import LoadedModel
from loadstone.model import KVCache
from loadstone.quantization.linear import Linear
from small_model import GENERATION

PATIENCE = 60  # seconds, after which a test fails instead of waiting on


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_home: Callable[[Path], Path]) -> Path:
    """An empty working directory and home, no LOADSTONE_ variables, and no manager of this process yet."""
    for name in os.environ:
        if name.startswith("LOADSTONE_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.setenv("LOADSTONE_HOME", str(new_home(tmp_path / "home")))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loadstone.manager, "_one", [])
    return folder


def _config(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"model_config": {"base_model": str(folder), **settings}, "generation": {"temperature": 0, "seed": 1}}


@pytest.fixture
def manager(small_model: Path) -> Iterator[ModelManager]:
    """A manager of the small model, not loaded yet."""
    with ModelManager(_config(small_model)) as manager:
        yield manager


def _names(events: list[Event]) -> list[str]:
    return [event.name for event in events if event.name != "load.progress"]


def _weights(model: LoadedModel) -> list[weakref.ref[torch.Tensor]]:
    """Every tensor that the decoder keeps, without keeping it."""
    decoder = model.decoder
    linears = [decoder.embedding, decoder.head]
    vectors = [decoder.norm, decoder.cosines, decoder.sines]
    for layer in decoder.layers:
        linears += [part.weight for part in (layer.query_key_value, layer.output, layer.gate_up, layer.down)]
        vectors += [layer.attention_norm, layer.mlp_norm]
    kept = [*vectors, *(tensor for linear in linears for tensor in linear.tensors().values())]
    assert len(kept) > 10
    return [weakref.ref(tensor) for tensor in kept]


def _alive(references: list[weakref.ref[Any]]) -> int:
    gc.collect()
    return sum(one() is not None for one in references)


def _holdings() -> set[int]:
    """What of a model this process holds now, of whichever load: weights, caches, files that are open."""
    gc.collect()
    # By type(): isinstance would ask objects of foreign libraries for their __class__.
    found = [one for one in gc.get_objects() if issubclass(type(one), (Linear, KVCache, Weights))]
    return {id(one) for one in found if not (isinstance(one, Weights) and not one._files)}


# -- configuration ----------------------------------------------------------------------------------------------------


def _as_found_file(folder: Path, here: Path) -> None:
    (here / "config").mkdir()
    (here / "config" / "config.yaml").write_text(json.dumps(_config(folder)), encoding="utf-8")


def _as_path(folder: Path, here: Path) -> Path:
    file = here / "mine.yaml"
    file.write_text(json.dumps(_config(folder)), encoding="utf-8")
    return file


FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "found": _as_found_file,
    "path": _as_path,
    "text of a path": lambda folder, here: str(_as_path(folder, here)),
    "mapping": lambda folder, here: _config(folder),
    "ConfigManager": lambda folder, here: ConfigManager(_config(folder)),
    "LoadstoneConfig": lambda folder, here: ConfigManager(_config(folder)).config,
}


@pytest.mark.parametrize("form", FORMS)
def test_configuration_has_many_forms(form: str, small_model: Path, here: Path) -> None:
    """None finds the file; a path, a mapping, a ConfigManager and its configuration mean the same."""
    manager = ModelManager(FORMS[form](small_model, here))
    assert isinstance(manager.config, ConfigManager)
    assert isinstance(manager.config.config, LoadstoneConfig)
    assert manager.config.config.model.base_model == str(small_model)
    assert manager.config.config.generation.seed == 1


def test_unsound_configuration_is_refused_when_it_is_given() -> None:
    """A wrong key is told before anything is loaded."""
    with pytest.raises(ConfigurationError, match="quantisation"):
        ModelManager({"model_config": {"quantisation": "4bit"}})


def test_process_has_one_manager(small_model: Path) -> None:
    """Everybody gets the same one, with or without saying the same configuration again."""
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: get_model_manager(_config(small_model)), range(32)))
    assert len(found) == 1
    assert get_model_manager() in found
    assert get_model_manager(_config(small_model)) in found


def test_second_configuration_is_refused(small_model: Path) -> None:
    """Another configuration is an error that says what to do, and changes nothing."""
    first = get_model_manager(_config(small_model))
    with pytest.raises(ConfigurationError, match="ModelManager"):
        get_model_manager(_config(small_model, context=64))
    assert get_model_manager() is first


def test_unsound_configuration_leaves_no_manager(small_model: Path) -> None:
    """After a mistake in the first call, a second call with a right one succeeds."""
    with pytest.raises(ConfigurationError):
        get_model_manager({"model_config": {"device": 7}})
    assert get_model_manager(_config(small_model)).config.config.model.device == "auto"


def test_load_qwen_model_is_a_shortcut(small_model: Path) -> None:
    """It loads with the process's manager, and returns transformers' tokenizer and model, as `load_base_model` does."""
    tokenizer, model = load_qwen_model(_config(small_model))
    manager = get_model_manager()
    assert (tokenizer, model) == manager.load_base_model() == load_qwen_model()
    ids = tokenizer("Hi", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=5, do_sample=False, repetition_penalty=1.0)[0][2:]
    wanted = manager.generate("Hi", raw=True, max_new_tokens=5, temperature=0, repetition_penalty=1.0)
    assert tokenizer.decode(answer) == str(wanted)
    manager.unload_model()


# -- loading ----------------------------------------------------------------------------------------------------------


def test_loading_twice_returns_the_same(manager: ModelManager, events: list[Event]) -> None:
    """The second call is no work: the same model comes back."""
    assert manager.load() is manager.load()
    assert _names(events).count("load.build") == 1


def test_threads_that_load_at_once_load_once(manager: ModelManager, events: list[Event]) -> None:
    """Whoever comes while a load is under way waits for it and gets its model."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: manager.load(), range(4)))
    assert len({id(model) for model in found}) == 1
    assert _names(events).count("load.build") == 1


def test_load_is_told_phase_by_phase(manager: ModelManager, events: list[Event]) -> None:
    """Each of the five steps is an event with model, seconds and success, and its seconds are in the info."""
    manager.load()
    phases = [event for event in events if event.name.startswith("load.") and "seconds" in event.fields]
    assert [event.name for event in phases] == [
        f"load.{name}" for name in ("resolve", "inspect", "plan", "build", "ready")
    ]
    assert all(event.fields["ok"] and event.fields["model"] for event in phases)
    assert list(manager.get_model_info()["load_seconds"]) == [event.name.removeprefix("load.") for event in phases]


@pytest.mark.parametrize("ask", ["generate", "stream", "generate_batch", "get_model_info"])
def test_asking_before_a_load_is_an_error(manager: ModelManager, ask: str) -> None:
    """The error says which call is missing; nothing is loaded by the way."""
    with pytest.raises(ModelNotLoadedError, match=r"load\(\)"):
        getattr(manager, ask)(*(() if ask == "get_model_info" else (["Hi"],)))
    assert not manager.is_loaded()


def test_reload_takes_the_files_as_they_are_now(manager: ModelManager, small_model: Path) -> None:
    """After a reload there is a new model, made from what the folder has now; the old one's weights are gone."""
    old = manager.load()
    weights = _weights(old)
    (small_model / "generation_config.json").write_text('{"top_k": 3}', encoding="utf-8")
    new = manager.reload_model()
    assert new is not old
    assert manager.get_model_info()["sampling"]["top_k"]["value"] == 3
    assert _alive(weights) == 0
    assert manager.generate("Hi", max_new_tokens=3).usage.completion_tokens == 3


def test_reload_loads_when_nothing_is_loaded(manager: ModelManager) -> None:
    manager.reload_model()
    assert manager.is_loaded()


def test_with_block_unloads(small_model: Path) -> None:
    """Leaving the block gives the model back, also by an error, and ends what was being answered."""
    manager = ModelManager(_config(small_model))
    with pytest.raises(ZeroDivisionError):
        _fail_inside(manager)
    assert not manager.is_loaded()


def _fail_inside(manager: ModelManager) -> None:
    with manager:
        manager.load()
        assert manager.is_loaded()
        manager.stream("Hi", max_new_tokens=2000)
        raise ZeroDivisionError


# -- unloading --------------------------------------------------------------------------------------------------------


def test_unload_lets_every_weight_go(manager: ModelManager) -> None:
    """Weights and cache die, though the caller still holds model and result."""
    before = _holdings()
    held = manager.load()
    weights, cache = _weights(held), weakref.ref(held.engine._batcher.cache)
    result = manager.generate("Hi", max_new_tokens=3)
    manager.unload_model()
    assert _alive([*weights, cache]) == 0
    assert _holdings() <= before
    assert not manager.is_loaded()
    assert (result.usage.completion_tokens, held.tokenizer.vocab_size) == (3, 256)


def test_unloaded_model_says_so(manager: ModelManager) -> None:
    """Who kept the model gets GenerationError for a question, and can still read what it was."""
    model = manager.load()
    manager.unload_model()
    manager.unload_model()  # once more is nothing
    with pytest.raises(GenerationError, match="unloaded"):
        model.generate("Hi")
    assert model.info()["strategy"] == "4bit"


def test_unload_waits_for_answers(manager: ModelManager) -> None:
    """An answer under way is finished first."""
    manager.load()
    stream = manager.stream("Hi", max_new_tokens=200)
    next(stream)
    manager.unload_model()
    assert not manager.is_loaded()
    for _ in stream:
        pass
    assert stream.result.usage.completion_tokens == 200


def test_unload_with_cancel_ends_answers(manager: ModelManager) -> None:
    """With `cancel` the one who reads gets GenerationError instead of the rest."""
    manager.load()
    stream = manager.stream("Hi", max_new_tokens=4000)
    next(stream)
    manager.unload_model(cancel=True)
    with pytest.raises(GenerationError, match="unloaded"):
        list(stream)


def test_interrupted_unload_unloads_all_the_same(manager: ModelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while waiting for an answer leaves no model that nobody can reach."""
    model = manager.load()
    weights = _weights(model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.engine, "drain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.unload_model()
    assert _alive(weights) == 0
    manager.load()
    assert manager.is_loaded()


def test_manager_that_nobody_holds_gives_its_model_back(small_model: Path) -> None:
    """Dropping manager and model without unloading frees the weights; an answer under way is finished."""
    manager = ModelManager(_config(small_model))
    model = manager.load()
    model.decoder.settle()  # until they are in the store, who writes them there holds them too
    weights = _weights(model)
    stream = manager.stream("Hi", max_new_tokens=20)
    del manager, model
    for _ in stream:
        pass
    assert stream.result.usage.completion_tokens == 20
    del stream
    assert _alive(weights) == 0


def _run(script: str, *arguments: str) -> str:
    """Run a script in a new interpreter, which must end well and say nothing on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_unload_gives_memory_back_to_the_system() -> None:
    """With the bundled model in 16 bits, unloading shrinks the process by at least half of the weights' bytes."""
    out = _run(
        "from loadstone import ModelManager\n"
        "from loadstone.hardware import process_rss\n"
        "manager = ModelManager({'model_config': {'base_model': 'smollm2', 'quantization': 'none'}})\n"
        "held = manager.load()\n"
        "weights = sum(held.decoder.weight_bytes().values())\n"
        "loaded = process_rss()\n"
        "manager.unload_model()\n"
        "print(weights, loaded, process_rss())\n"
    )
    weights, loaded, unloaded = map(int, out.split())
    assert weights > 250_000_000
    assert loaded - unloaded > weights / 2


def test_process_may_end_in_mid_answer(small_model: Path) -> None:
    """A program that ends while an answer is being made ends at once and quietly."""
    out = _run(
        "import sys\n"
        "from loadstone import ModelManager\n"
        "manager = ModelManager({'model_config': {'base_model': sys.argv[1]}})\n"
        "manager.load()\n"
        "stream = manager.stream('Hi', max_new_tokens=4000)\n"
        "next(stream)\n"
        "print('left')\n",
        str(small_model),
    )
    assert out == "left\n"


# -- failed loads -----------------------------------------------------------------------------------------------------


def _fails_and_leaves_nothing(manager: ModelManager, kind: type[BaseException], match: str) -> BaseException:
    """Load, which must fail; return the error, held, after a look at what else is left."""
    before = _holdings()
    with pytest.raises(kind, match=match) as caught:
        manager.load()
    assert not manager.is_loaded()
    assert _holdings() <= before
    return caught.value


def test_truncated_checkpoint_leaves_nothing(manager: ModelManager, small_model: Path) -> None:
    """The error names the file; when the file is whole again, the same manager loads it."""
    file = small_model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    error = _fails_and_leaves_nothing(manager, CheckpointError, "model.safetensors")
    file.write_bytes(whole)
    manager.load()
    assert manager.generate("Hi", max_new_tokens=2).text is not None
    assert error.__traceback__ is not None


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit", "int4"])
def test_failure_in_mid_build_leaves_nothing(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """A disk that fails half-way: cause kept, tensors dead although the error is held, the next load works."""
    manager = ModelManager(_config(small_model, quantization=quantization))
    read = Weights.numbers
    seen: list[weakref.ref[torch.Tensor]] = []

    def failing(self: Weights, *rest: Any) -> torch.Tensor:
        if len(seen) >= 9:
            raise OSError(5, "Input/output error")
        tensor = read(self, *rest)
        seen.append(weakref.ref(tensor))
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "numbers", failing)
        error = _fails_and_leaves_nothing(manager, ModelLoadError, "Input/output error")
    assert isinstance(error.__cause__, OSError)
    assert len(seen) >= 9
    assert _alive(seen) == 0
    manager.load()
    assert manager.is_loaded()
    manager.unload_model()


def test_memory_running_out_in_mid_build_is_a_resource_error(
    manager: ModelManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as what it is, with a setting to turn, and nothing remains."""

    def failing(self: Weights, *_: Any) -> torch.Tensor:
        raise MemoryError("cannot allocate 7 bytes")

    monkeypatch.setattr(Weights, "numbers", failing)
    error = _fails_and_leaves_nothing(manager, ResourceError, "memory did not suffice for")
    assert "quantization" in str(error)
    assert "cannot allocate 7 bytes" in str(error.__cause__)


def test_interrupted_load_leaves_nothing(manager: ModelManager) -> None:
    """Ctrl-C in mid-build is passed on, and the next load works."""
    progress: list[Event] = []

    def interrupt(event: Event) -> None:
        if event.name == "load.progress":
            progress.append(event)
            if len(progress) == 5:
                raise KeyboardInterrupt

    end = subscribe(interrupt)
    try:
        _fails_and_leaves_nothing(manager, KeyboardInterrupt, "^$")
    finally:
        end()
    manager.load()
    assert manager.is_loaded()


def test_missing_tokenizer_is_told_before_weights_are_read(
    manager: ModelManager, small_model: Path, events: list[Event]
) -> None:
    """What can be known from small files is not found out after the long work."""
    shutil.move(small_model / "tokenizer.json", small_model / "elsewhere")
    _fails_and_leaves_nothing(manager, CheckpointError, "tokenizer.json")
    assert "load.build" not in _names(events)


def test_model_that_is_not_there(tmp_path: Path) -> None:
    """A path that does not exist is a SourceError that names it."""
    manager = ModelManager(_config(tmp_path / "nowhere"))
    _fails_and_leaves_nothing(manager, SourceError, re.escape(str(tmp_path / "nowhere")))


def test_damaged_weights_are_warned_of(manager: ModelManager, small_model: Path, events: list[Event]) -> None:
    """NaN in the weights is told while loading, and asking such a model is a GenerationError, not a crash."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, small_model / "model.safetensors")
    manager.load()
    assert "load.warning" in _names(events)
    with pytest.raises(GenerationError, match="NaN"):
        manager.generate("Hi")


@pytest.mark.parametrize("changes", [{}, {"quantization": "auto"}, {"quantization": "none", "context": 128}])
def test_too_little_memory_is_refused_before_weights_are_read(
    small_model: Path, events: list[Event], changes: dict[str, Any]
) -> None:
    """What does not fit by arithmetic is a ResourceError with the bytes, and no weight is opened."""
    manager = ModelManager(_config(small_model, max_memory="10MB", **changes))
    error = _fails_and_leaves_nothing(manager, ResourceError, "max_memory")
    assert isinstance(error, ResourceError)
    assert error.allowed == 10_000_000
    assert error.needed is not None
    assert error.needed > error.allowed
    assert error.would_fit == ()  # the interpreter alone takes more
    assert [(event.name, event.fields["ok"]) for event in events][-1] == ("load.plan", False)
    assert "load.build" not in _names(events)


def test_refusal_says_what_would_fit(events: list[Event]) -> None:
    """With room for the bundled model in 4 bits, `none` is refused with that advice."""
    wish = {"base_model": "smollm2", "quantization": "none", "context": 8192}
    generous = ModelManager({"model_config": {**wish, "max_memory": "64GB", "force": True}})
    needed = generous.plan().needed_bytes
    manager = ModelManager({"model_config": {**wish, "max_memory": needed - 140_000_000}})
    error = _fails_and_leaves_nothing(manager, ResourceError, "Would fit")
    assert isinstance(error, ResourceError)
    assert any("4bit" in way for way in error.would_fit)
    assert "load.build" not in _names(events)


# -- answers and facts ------------------------------------------------------------------------------------------------


def test_answer_has_text_usage_and_timing(smollm2: ModelManager) -> None:
    """The bundled model answers a simple question sensibly; the result is its text, and more."""
    result = smollm2.generate("What is the capital of France?", max_new_tokens=32)
    assert "Paris" in str(result)
    assert str(result) == result.text
    assert result.finish_reason in ("stop", "length")
    assert 0 < result.usage.completion_tokens <= 32
    assert result.timing.total_s > 0


def test_answers_of_all_forms_agree(manager: ModelManager) -> None:
    """Streamed, in a batch, or at once: the same text. A batch needs a list."""
    manager.load()
    result = manager.generate("Hi", max_new_tokens=12)
    assert "".join(map(str, manager.stream("Hi", max_new_tokens=12))) == result.text
    batch = manager.generate_batch(["Hi", [{"role": "user", "content": "Hi"}]], max_new_tokens=12)
    assert [one.text for one in batch] == [result.text] * 2
    with pytest.raises(ConfigurationError, match="list"):
        manager.generate_batch("Hi")


def test_answers_of_a_seed_can_be_had_again(manager: ModelManager) -> None:
    """The same seed gives the same noise, another seed another."""
    manager.load()

    def answer(seed: int) -> str:
        return manager.generate("Hi", max_new_tokens=24, temperature=1.5, seed=seed).text

    assert answer(5) == answer(5)
    assert answer(5) != answer(6)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"max_new_tokens": 0}, {"top_q": 1}, {"stop": ""}])
def test_settings_that_cannot_be_meant(manager: ModelManager, settings: dict[str, Any]) -> None:
    """A wrong setting of a call is a ConfigurationError that names it, in each kind of call."""
    manager.load()
    for ask in (manager.generate, manager.stream, manager.generate_batch):
        with pytest.raises(ConfigurationError, match=next(iter(settings))):
            ask(["Hi"], **settings)  # type: ignore[operator]


def test_sampling_in_force_and_its_origins(small_model: Path, here: Path) -> None:
    """The checkpoint's wishes give way to the configuration's, those to the call's; each value says whose it is."""
    file = here / "loadstone.yaml"
    text = f"model_config:\n  base_model: {small_model}\ngeneration:\n  top_p: 0.5\n  top_k: 7\n"
    file.write_text(text, encoding="utf-8")
    with ModelManager() as manager:
        model = manager.load()
        told = manager.get_model_info()["sampling"]
        sampling, origins = model.sampling(GenerationConfig(top_k=3, min_p=0.1), {"top_k": 2})
    assert told["temperature"] == {"value": 0.7, "from": "generation_config.json"}
    assert told["top_p"] == {"value": 0.5, "from": "loadstone.yaml:4"}
    assert told["top_k"] == {"value": 7, "from": "loadstone.yaml:5"}
    assert told["seed"] == {"value": None, "from": "default"}
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.5, 2, 0.1)
    assert [origins[name] for name in ("top_k", "min_p")] == ["argument", "GenerationConfig"]
    assert GENERATION["repetition_penalty"] == sampling.repetition_penalty


def test_call_settings_are_in_force_for_the_call(manager: ModelManager) -> None:
    """max_new_tokens of the call, of its config, and of nobody."""
    manager.load()
    config = GenerationConfig(max_new_tokens=7)
    assert manager.generate("Hi", config).usage.completion_tokens == 7
    assert manager.generate("Hi", config, max_new_tokens=3).usage.completion_tokens == 3
    assert manager.generate("Hi").usage.completion_tokens == 512


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, (str, int, float, bool))


def test_info_tells_everything(smollm2: ModelManager) -> None:
    """Parameters, strategy, device and reason, bytes, phases, context, template, revision, sampling: plain values."""
    info = smollm2.get_model_info()
    parts = info["parameters"]
    assert parts["total"] == 134_515_008 == sum(parts.values()) - parts["total"]
    assert set(parts) == {"total", "embedding", "linear", "lm_head", "norm"}
    assert (info["name"], info["architecture"], info["format"]) == ("smollm2", "llama", "gguf")
    assert (info["strategy"], info["context"], info["max_context"]) == ("4bit", 4096, 8192)
    device = smollm2.get_device()
    assert (info["device"], info["device_reason"]) == (device.torch_name, device.reason)
    assert info["device_reason"]
    assert any("as asked" in reason for reason in info["reasons"])
    sizes = info["bytes"]
    assert set(sizes) == {"embedding", "linear", "lm_head", "norm", "kv_cache"}
    assert sizes["linear"] < 0.6 * parts["linear"]
    assert sizes["kv_cache"] == info["planned_bytes"]["kv_cache"]
    assert all(seconds >= 0 for seconds in info["load_seconds"].values())
    assert info["revision"]
    assert "gguf" in info["template"]
    assert set(info["sampling"]) == set(GenerationConfig.model_fields)
    assert 0 < info["memory"]["rss"] <= info["memory"]["peak_rss"]
    assert _plain(info)
    json.dumps(info)


def test_plan_foretells_the_bytes(smollm2: ModelManager) -> None:
    """What the plan said of weights is what they take, to a tenth."""
    info = smollm2.get_model_info()
    taken = sum(size for part, size in info["bytes"].items() if part != "kv_cache")
    assert info["planned_bytes"]["weights"] == pytest.approx(taken, rel=0.1)


def test_device_is_told_before_and_after_loading(manager: ModelManager) -> None:
    """Before a load it is the one that would be chosen, then the one that was."""
    before = manager.get_device()
    manager.load()
    assert manager.get_device().torch_name == before.torch_name
    assert before.reason


def test_unknown_device_is_refused(small_model: Path) -> None:
    manager = ModelManager(_config(small_model, device="cuda:99"))
    for ask in (manager.get_device, manager.load):
        with pytest.raises(ConfigurationError, match="cuda:99"):
            ask()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_given_back_between_answers(manager: ModelManager) -> None:
    """clear_cache and optimize_memory return bytes, with a model and without, and the next answer is the same."""
    assert manager.clear_cache() >= 0
    manager.load()
    text = manager.generate("Hi", max_new_tokens=12).text
    assert manager.clear_cache() >= 0
    sizes = manager.optimize_memory()
    assert all(sizes[name] > 1_000_000 for name in ("before", "after"))
    assert manager.generate("Hi", max_new_tokens=12).text == text


def test_clearing_gives_the_cache_back(manager: ModelManager) -> None:
    """The keys and values of finished answers are let go of."""
    model = manager.load()
    manager.generate("Hi", max_new_tokens=2)
    before = weakref.ref(model.engine._batcher.cache)
    manager.clear_cache()
    assert before() is None


def test_clearing_while_answering_harms_nobody(manager: ModelManager) -> None:
    """Answers that run while the cache is asked back again and again are those that run alone."""
    engine = manager.load().engine
    alone = [manager.generate(text, max_new_tokens=5).text for text in "abc"]
    done = threading.Event()

    def clear() -> None:
        while not done.wait(0.0001):
            engine.renew_cache()

    clearing = threading.Thread(target=clear)
    clearing.start()
    try:
        for _ in range(20):
            assert [manager.generate(text, max_new_tokens=5).text for text in "abc"] == alone
    finally:
        done.set()
        clearing.join(PATIENCE)
    engine.wait_until_idle()
    assert engine._batcher.prefixes.free_blocks == engine._batcher.cache.blocks


def test_managers_live_side_by_side(small_model: Path, smollm2: ModelManager) -> None:
    """Two managers have two models; unloading one leaves the other."""
    with ModelManager(_config(small_model, quantization="none")) as other:
        other.load()
        assert other.get_model_info()["strategy"] == "none"
        assert smollm2.get_model_info()["strategy"] == "4bit"
    assert smollm2.is_loaded()
    assert smollm2.generate("Hi", max_new_tokens=2).usage.completion_tokens <= 2


def test_an_unknown_strategy_is_refused_before_anything_is_fetched(events: list[Event]) -> None:
    manager = ModelManager({"model_config": {"base_model": "smollm2", "quantization": "4bits"}})
    with pytest.raises(ConfigurationError, match=r"argument: quantization '4bits' is not known\n.*mean 4bit"):
        manager.load()
    assert not [event for event in events if event.name.startswith("load.")]


def test_a_phase_is_logged_with_model_phase_bytes_and_seconds(small_model: Path, events: list[Event]) -> None:
    with ModelManager({"model_config": {"base_model": str(small_model)}}) as manager:
        manager.load()
    (built,) = [event for event in events if event.name == "load.build"]
    assert built.fields["model"] == str(small_model)
    assert built.fields["phase"] == "build"
    assert built.fields["bytes"] > 0
    assert built.fields["seconds"] > 0


def test_a_failed_phase_is_logged_with_its_error(small_model: Path, events: list[Event]) -> None:
    (small_model / "config.json").write_text("{")
    with pytest.raises(ModelLoadError):
        ModelManager({"model_config": {"base_model": str(small_model)}}).load()
    (failed,) = [event for event in events if event.fields.get("ok") is False]
    assert failed.fields["error"].startswith("CheckpointError: ")


def test_a_plan_reads_no_weights(events: list[Event]) -> None:
    plan = ModelManager({"model_config": {"base_model": "smollm2"}}).plan()
    assert plan.strategy == "4bit"
    assert plan.needed_bytes <= plan.allowed_bytes
    assert not [event for event in events if event.name == "load.build"]


def test_the_memory_that_a_refusal_advises_is_enough() -> None:
    def refused(limit: str) -> ResourceError:
        with pytest.raises(ResourceError) as caught:
            ModelManager({"model_config": {"base_model": "smollm2", "max_memory": limit}}).plan()
        return caught.value

    advised = re.search(r"at least ([0-9.]+ [KMG]B)", str(refused("300MB")))
    assert advised is not None
    plan = ModelManager({"model_config": {"base_model": "smollm2", "max_memory": advised[1]}}).plan()
    assert plan.needed_bytes <= plan.allowed_bytes


def test_a_model_being_unloaded_takes_no_more_requests(small_model: Path) -> None:
    manager = ModelManager({"model_config": {"base_model": str(small_model)}})
    model = manager.load()
    model.engine.drain()
    with pytest.raises(GenerationError, match="unloaded"):
        model.generate("more", max_new_tokens=1)
    manager.unload_model()
