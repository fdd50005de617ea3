"""Claims about the environment, arguments, and which layer wins."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from loadstone.config import ConfigManager, GenerationConfig, LoadConfig, LoadstoneConfig
from loadstone.errors import ConfigurationError

DEVICE = "LOADSTONE_MODEL_CONFIG__DEVICE"


def test_each_layer_goes_over_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults < file < environment < arguments, and origin() tells which."""
    manager = ConfigManager()
    assert (manager.config.model.device, manager.origin("model_config.device")) == ("auto", "default")

    (folder / "loadstone.yaml").write_text("model_config:\n  device: cuda\n  streams: 2\n")
    manager = ConfigManager()
    assert manager.config.model.device == "cuda"
    assert manager.origin("model_config.device") == "loadstone.yaml:2"

    monkeypatch.setenv(DEVICE, "mps")
    manager = ConfigManager()
    assert (manager.config.model.device, manager.origin("model_config.device")) == ("mps", DEVICE)

    manager = ConfigManager(overrides={"model_config.device": "cpu"})
    assert (manager.config.model.device, manager.origin("model_config.device")) == ("cpu", "argument")
    assert (manager.config.model.streams, manager.origin("model_config.streams")) == (2, "loadstone.yaml:3")


def test_a_mapping_stands_in_place_of_the_file_and_over_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "loadstone.yaml").write_text("model_config:\n  streams: 7\n")
    monkeypatch.setenv(DEVICE, "mps")
    monkeypatch.setenv("LOADSTONE_MODEL_CONFIG__QUANTIZATION", "8bit")
    manager = ConfigManager({"model_config": {"device": "cpu", "base_model": Path("a/b")}})
    model = manager.config.model
    assert (model.device, model.quantization, model.streams) == ("cpu", "8bit", 1)
    assert model.base_model == str(Path("a/b"))
    assert manager.origin("model_config.device") == "argument"
    assert manager.files == ()


def test_a_finished_config_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "mps")
    config = LoadstoneConfig(model=LoadConfig(max_memory=20_000), generation=GenerationConfig(stop=("x",)))
    manager = ConfigManager(config)
    assert manager.config == config
    assert manager.origin("model_config.max_memory") == "argument"
    assert manager.origin("model_config.device") == "default"


def test_a_manager_made_from_a_manager_reads_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "loadstone.yaml"
    file.write_text("model_config:\n  device: cuda\n")
    first = ConfigManager()
    file.unlink()
    monkeypatch.setenv(DEVICE, "mps")
    second = first.with_overrides({"generation": {"seed": 3}})
    assert second.config.model.device == "cuda"
    assert second.config.generation.seed == 3
    assert first.config.generation.seed is None
    assert ConfigManager(first).config == first.config
    assert second.files == first.files == (Path("loadstone.yaml"),)


def test_overrides_may_be_dotted_nested_or_wishes() -> None:
    manager = ConfigManager(
        {},
        overrides={
            "model_config.context": "32k",
            "retry": {"max_attempts": 1},
            "generation": GenerationConfig(temperature=0),
        },
    )
    assert manager.config.model.context == 32_768
    assert manager.config.retry.max_attempts == 1
    assert manager.config.generation.temperature == 0
    assert manager.origin("generation.top_p") == "default"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model_config.devcie": "cpu"}, "did you mean 'device'?"),
        ({"model.device": "cpu"}, "did you mean 'model_config'?"),
        ({"model_config": {"maxmemory": 1}}, "did you mean 'max_memory'?"),
        ({"model_config": 3}, "model_config must be a mapping"),
        ({3: 3}, "'3' is not a known key"),
        ({"model_config.max_memory": "20 bananas"}, "argument: model_config.max_memory: '20 bananas'"),
        ({"model_config.context": 10**5000}, "argument: model_config.context"),
    ],
)
def test_wrong_arguments_are_said_to_be_arguments(overrides: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConfigManager({}, overrides=overrides)
    assert says in str(caught.value)
    with pytest.raises(ConfigurationError):
        ConfigManager({}).with_overrides(overrides)


def test_something_that_is_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Give None, a path, a mapping"):
        ConfigManager(42)  # type: ignore[arg-type]


def test_origin_of_a_key_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'device'"):
        ConfigManager({}).origin("model_config.devise")


def test_generation_layers_tell_the_origin_of_each_value(folder: Path) -> None:
    (folder / "loadstone.yaml").write_text("generation:\n  top_p: 0.5\n")
    manager = ConfigManager(overrides={"generation.seed": 1, "generation.temperature": 0.5})
    layers = dict(manager.generation_layers())
    assert layers["loadstone.yaml:2"] == GenerationConfig(top_p=0.5)
    assert layers["argument"] == GenerationConfig(seed=1, temperature=0.5)


@pytest.mark.parametrize(
    ("name", "raw", "attribute", "value"),
    [
        ("BASE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct", "base_model", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("BASE_MODEL", "/models/my #1: best", "base_model", "/models/my #1: best"),
        ("BASE_MODEL", "'quoted'", "base_model", "quoted"),
        ("REVISION", "12e4567", "revision", "12e4567"),
        ("REVISION", "0123456", "revision", "0123456"),
        ("REVISION", "null", "revision", None),
        ("MAX_MEMORY", "16GiB", "max_memory", 2**34),
        ("MAX_MEMORY", "20000000000", "max_memory", 20_000_000_000),
        ("QUANTIZATION", "8", "quantization", "8bit"),
        ("QUANTIZATION", "~", "quantization", "none"),
        ("CONTEXT", "32k", "context", 32_768),
        ("STREAMS", "4", "streams", 4),
        ("OFFLINE", "1", "offline", True),
        ("FORCE", "false", "force", False),
        ("DEVICE", "", "device", "auto"),
    ],
)
def test_variables_are_read_as_their_setting_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, raw: str, attribute: str, value: object
) -> None:
    monkeypatch.setenv(f"LOADSTONE_MODEL_CONFIG__{name}", raw)
    assert getattr(ConfigManager({}).config.model, attribute) == value


@pytest.mark.parametrize(
    ("raw", "stop"),
    [
        ('["a", "b"]', ("a", "b")),
        ("User:", ("User:",)),
        ("###", ("###",)),
        ("no", ("no",)),
        ('"\\n"', ("\n",)),
        ("[", ("[",)),
    ],
)
def test_stop_strings_in_a_variable_are_a_list_or_the_text_itself(
    monkeypatch: pytest.MonkeyPatch, raw: str, stop: tuple[str, ...]
) -> None:
    monkeypatch.setenv("LOADSTONE_GENERATION__STOP", raw)
    assert ConfigManager({}).config.generation.stop == stop


@pytest.mark.parametrize("name", ["LOADSTONE_LOG", "LOADSTONE_HOME", "LOADSTONE_CACHE_LIMIT", "OTHER_A__B"])
def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "anything")
    assert ConfigManager().config == LoadstoneConfig()


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("LOADSTONE_MODEL_CONFIG__DEVCIE", DEVICE),
        ("LOADSTONE_MODELCONFIG__DEVICE", DEVICE),
        ("LOADSTONE_MODEL_CONFIG__device", DEVICE),
        ("LOADSTONE_MODEL_CONFIG_DEVICE", DEVICE),
        ("LOADSTONE_RETRY__MAX_ATTEMPTS__X", "LOADSTONE_RETRY__MAX_ATTEMPTS"),
        ("LOADSTONE_RETRY", "LOADSTONE_RETRY__MAX_ATTEMPTS"),
    ],
)
def test_a_variable_that_misses_a_setting_is_an_error_with_the_right_name(
    monkeypatch: pytest.MonkeyPatch, name: str, likely: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigurationError) as caught:
        ConfigManager()
    assert f"{name} is not a setting; did you mean {likely}?" in str(caught.value)


def test_a_wrong_value_in_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADSTONE_MODEL_CONFIG__MAX_MEMORY", "20 bananas")
    with pytest.raises(ConfigurationError) as caught:
        ConfigManager()
    assert str(caught.value).startswith("LOADSTONE_MODEL_CONFIG__MAX_MEMORY: model_config.max_memory: '20 ban")
    assert caught.value.key == "model_config.max_memory"
    assert caught.value.file is None


def test_a_configuration_survives_pickling() -> None:
    manager = ConfigManager({"model_config": {"max_memory": "20GB"}})
    copy = pickle.loads(pickle.dumps(manager))  # noqa: S301 - our own bytes
    assert copy.config == manager.config
    assert copy.origin("model_config.max_memory") == "argument"
