"""Claims about the configuration file: that it is found, read, and that what is wrong with it is said."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from loadstone.config import ConfigManager
from loadstone.config.schema import known_keys
from loadstone.errors import ConfigurationError

SHIPPED = Path(__file__).parents[2] / "config" / "config.yaml"
PROMISED = """\
model_config:
  base_model: "Qwen/Qwen2.5-7B-Instruct"
  device: "auto"          # auto | cpu | cuda | cuda:1 | mps | mps:0
  max_memory: "20GB"
  quantization: "4bit"    # none | 8bit | 4bit | int4 | auto …
"""


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(text: str | bytes) -> ConfigurationError:
    """Return the error that a file with this text gives."""
    path = write(Path("some.yaml"), text)
    with pytest.raises(ConfigurationError) as caught:
        ConfigManager(path)
    assert str(caught.value).startswith("some.yaml:")
    return caught.value


def test_the_promised_file_works(folder: Path) -> None:
    write(folder / "config/config.yaml", PROMISED)
    manager = ConfigManager()
    model = manager.config.model
    assert (model.base_model, model.device) == ("Qwen/Qwen2.5-7B-Instruct", "auto")
    assert (model.max_memory, model.quantization) == (20_000_000_000, "4bit")
    assert manager.origin("model_config.max_memory") == f"{Path('config/config.yaml')}:4"
    assert manager.files == (Path("config/config.yaml"),)


def test_the_repository_ships_the_promised_file() -> None:
    """The rest of it is comments."""
    text = SHIPPED.read_text(encoding="utf-8")
    assert text.startswith(f"{PROMISED}\n#")
    assert ConfigManager(SHIPPED).config == ConfigManager(write(Path("some.yaml"), PROMISED)).config


def test_the_shipped_file_has_every_setting_as_it_is_when_left_out() -> None:
    _, _, rest = SHIPPED.read_text(encoding="utf-8").partition("otherwise.\n")
    written = PROMISED + "".join(line.removeprefix("# ").removeprefix("#") for line in rest.splitlines(keepends=True))
    manager = ConfigManager(write(Path("some.yaml"), written))
    assert manager.config == ConfigManager(SHIPPED).config
    assert [key for key in known_keys() if manager.origin(key) == "default"] == []


def test_no_file_at_all_means_the_defaults() -> None:
    manager = ConfigManager()
    assert manager.files == ()
    assert manager.config.model.quantization == "4bit"
    assert manager.origin("model_config.quantization") == "default"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~\n", "model_config:\n", "generation: ~\n"])
def test_an_empty_file_or_section_means_the_defaults(text: str) -> None:
    manager = ConfigManager(write(Path("some.yaml"), text))
    assert manager.config == ConfigManager({}).config


def test_files_are_looked_for_in_the_promised_order(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Explicit, LOADSTONE_CONFIG, config/config.yaml, loadstone.yaml, LOADSTONE_HOME: each hides the next."""
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path / "moved"))
    places = [
        tmp_path / "moved/config.yaml",
        folder / "loadstone.yaml",
        folder / "config/config.yaml",
        tmp_path / "named.yaml",
    ]
    for number, place in enumerate(places):
        write(place, f"model_config:\n  streams: {number + 1}\n")
        if place.name == "named.yaml":
            monkeypatch.setenv("LOADSTONE_CONFIG", str(place))
        assert ConfigManager().config.model.streams == number + 1
    explicit = write(tmp_path / "explicit.yaml", "model_config:\n  streams: 9\n")
    assert ConfigManager(explicit).config.model.streams == 9
    assert ConfigManager(str(explicit)).files == (explicit,)


def test_the_users_config_folder_is_searched_last() -> None:
    place = platformdirs.user_config_path("loadstone", appauthor=False) / "config.yaml"
    write(place, "model_config:\n  device: cpu\n")
    assert ConfigManager().files == (place,)


def test_a_missing_explicit_file_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: there is no such file"):
        ConfigManager("nowhere.yaml")


def test_a_home_of_nobody_is_a_missing_file() -> None:
    with pytest.raises(ConfigurationError, match="there is no such file"):
        ConfigManager("~nobody-of-this-name/config.yaml")


def test_a_missing_file_in_the_variable_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOADSTONE_CONFIG", "nowhere.yaml")
    with pytest.raises(ConfigurationError, match=r"LOADSTONE_CONFIG names nowhere\.yaml"):
        ConfigManager()


def test_a_directory_is_an_error(folder: Path) -> None:
    (folder / "config/config.yaml").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="it is a directory"):
        ConfigManager()


def test_a_huge_file_is_refused_without_being_parsed() -> None:
    assert "no configuration file" in str(refused(b"x" * (2**20 + 1)))


@pytest.mark.parametrize(
    ("text", "line", "key", "says"),
    [
        ("model_config:\n  devcie: cpu\n", 2, "model_config.devcie", "did you mean 'device'?"),
        ("modelconfig:\n  device: cpu\n", 1, "modelconfig", "did you mean 'model_config'?"),
        ("\ndevice: cpu\n", 2, "device", "did you mean 'model_config.device'?"),
        ("model_config:\n  seed: 1\n", 2, "model_config.seed", "did you mean 'generation.seed'?"),
        ("zzzzzz: 1\n", 1, "zzzzzz", "known are model_config, generation, engine, retry"),
        (
            "model_config:\n  max_memory: 20 bananas\n",
            2,
            "model_config.max_memory",
            "'bananas' is not a unit",
        ),
        ("model_config:\n\n  max_memory: -3GB\n", 3, "model_config.max_memory", "must be above zero"),
        ("model_config:\n  max_memory: -3\n", 2, "model_config.max_memory", "must be above zero"),
        ("model_config:\n  max_memory: 2.5\n", 2, "model_config.max_memory", "2.5 is not a size"),
        ("model_config:\n  max_memory: [1GB]\n", 2, "model_config.max_memory", "is not a size"),
        ("model_config:\n  streams: many\n", 2, "model_config.streams", "must be a whole number, not 'many'"),
        ("model_config:\n  force: 1\n", 2, "model_config.force", "must be true or false, not 1"),
        ("model_config:\n  base_model: 42\n", 2, "model_config.base_model", "must be text (in quotes"),
        ("model_config:\n  device: gpu 1\n", 2, "model_config.device", "'gpu 1' is not a device"),
        ("generation:\n  temperature: hot\n", 2, "generation.temperature", "must be a number, not 'hot'"),
        ("generation:\n  top_p: 1.5\n", 2, "generation.top_p", "less than or equal to 1"),
        ("retry:\n  max_attempts: 0\n", 2, "retry.max_attempts", "greater than or equal to 1"),
        ("retry: 3\n", 1, "retry", "must be a mapping of settings, not 3"),
        ("retry:\n  max_wait: 1\n  max_wait: 2\n", 3, "max_wait", "the first is in line 2"),
        ("retry: {}\nmodel_config: {}\nretry: {}\n", 3, "retry", "the first is in line 1"),
        ("generation:\n  stop: &a [*a]\n", 2, "stop", "cannot be read"),
        ("generation:\n  stop: !!python/name:os.system\n", 2, "stop", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_line_key_and_remedy(text: str, line: int, key: str, says: str) -> None:
    error = refused(text)
    assert says in str(error)
    assert (error.file, error.line, error.key) == (Path("some.yaml"), line, key)
    assert str(error).startswith(f"some.yaml:{line}: ")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model_config:\n\tdevice: cpu\n", 2, "cannot start any token"),
        ("model_config:\n  device: [cpu\n", 3, "not YAML"),
        ("model_config:\n  device: cpu: 1\n", 2, "not YAML"),
        (b"model_config:\n  device: \x00\n", 2, "special characters"),
        (b"model_config:\n  # caf\xe9\n", 2, "not UTF-8"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("- model_config\n", 1, "must be a mapping of sections"),
        ("just words\n", 1, "must be a mapping of sections"),
        ("? [a]\n: 1\n", 1, "a key must be one word"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused_with_its_line(text: str | bytes, line: int, says: str) -> None:
    error = refused(text)
    assert says in str(error)
    assert error.line == line


@pytest.mark.parametrize("text", ["[" * 5000, "generation:\n  stop: " + "[" * 400 + "]" * 400])
def test_deep_nesting_is_refused_and_does_not_end_the_process(text: str) -> None:
    refused(text)


def test_a_value_that_unfolds_to_billions_is_refused_quickly() -> None:
    layers = "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    error = refused(f"generation:\n  stop: [&a0 [x]{layers}]\n")
    assert error.key == "generation.stop"
    assert len(str(error)) < 1000


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    path = write(Path("some.yaml"), b"\xef\xbb\xbfmodel_config:\r\n  device: cpu\r\n")
    assert ConfigManager(path).config.model.device == "cpu"


def test_a_found_file_of_somebody_else_is_told_how_to_be_avoided(folder: Path) -> None:
    write(folder / "config/config.yaml", "database:\n  host: x\n")
    with pytest.raises(ConfigurationError, match="name another with LOADSTONE_CONFIG"):
        ConfigManager()


def test_numbers_with_an_exponent_are_numbers_and_dates_are_text() -> None:
    text = "generation:\n  min_p: 1e-2\nmodel_config:\n  revision: 2024-01-01\n"
    config = ConfigManager(write(Path("some.yaml"), text)).config
    assert config.generation.min_p == 0.01
    assert config.model.revision == "2024-01-01"
