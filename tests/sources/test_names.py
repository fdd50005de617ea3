"""Which source a name belongs to, and sources of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import FILES, SHARD, FakeHub
from test_headers import small_model
from test_sources_hub import named

from loadstone.checkpoint import inspect
from loadstone.config import RetryConfig
from loadstone.errors import ConfigurationError, SourceError, TransientSourceError
from loadstone.sources import (
    SOURCES,
    Listing,
    ModelFiles,
    NoPartsError,
    Reference,
    RemoteFile,
    RemoteSource,
    Source,
    Terms,
    register_source,
    resolve,
    resolve_headers,
)
from loadstone.telemetry import Event


@pytest.fixture(autouse=True)
def doors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_things", dict(SOURCES._things))
    monkeypatch.setattr(SOURCES, "_problems", {})


# Names


def test_the_name_of_a_source_may_stand_before_any_name(hub: FakeHub, small_model: Path) -> None:
    assert resolve("hub:org/model") == resolve("org/model")
    assert resolve(f"local:{small_model}") == resolve(str(small_model))
    assert resolve("bundled:smollm2") == resolve("smollm2")


def test_it_tells_a_repository_from_a_folder_of_the_same_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "mine.gguf").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").weights[0].name == "mine.gguf"
    assert resolve("hub:org/model").weights[0].read_bytes() == SHARD


@pytest.mark.parametrize("name", ["ftp://host/folder", "gs://bucket/folder", "nothing://"])
def test_an_address_that_no_source_knows_names_those_that_are_known(name: str) -> None:
    with pytest.raises(SourceError, match="known are bundled, local, hub, modelscope, https, http, s3") as caught:
        resolve(name)
    assert "loadstone.sources" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["bundled:gpt2", "hub:model", "hub:", "modelscope:x"])
def test_a_name_that_its_source_cannot_mean_is_refused(name: str) -> None:
    with pytest.raises((SourceError, ConfigurationError)):
        resolve(name)


def test_a_disk_is_no_source() -> None:
    with pytest.raises(SourceError, match="does not exist"):
        resolve("c:model.gguf")


# Sources of others


class Shelf(RemoteSource):
    """Files in a dictionary, to which anything may happen."""

    name = "shelf"
    summary = "a dictionary"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.failures: list[Exception] = []
        self.read_from: list[int] = []

    def list_files(self, reference: Reference) -> Listing:
        import hashlib

        return Listing.of(
            RemoteFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in self.files.items()
        )

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        self.read_from.append(start)
        if self.failures:
            raise self.failures.pop(0)
        yield self.files[file.name][start:stop]


@pytest.fixture
def shelf(cache: Path) -> Shelf:
    made = Shelf({name: data for name, data in FILES.items() if "/" not in name})
    register_source(made)
    return made


def test_a_registered_source_has_all_that_built_in_ones_have(shelf: Shelf, events: list[Event]) -> None:
    files = resolve("shelf:a/b/tiny@v2")
    assert files.weights[0].read_bytes() == SHARD
    assert (files.name, files.origin) == ("shelf:a/b/tiny", "shelf: a/b/tiny")
    assert named(events, "source.download")
    before = len(shelf.read_from)
    assert resolve("shelf:a/b/tiny@v2", offline=True) == files
    assert len(shelf.read_from) == before


def test_its_headers_are_read_by_parts(shelf: Shelf) -> None:
    shelf.files = small_model()
    headers = resolve_headers("shelf:tiny")
    assert inspect(headers.files, headers.remote).layers == 1
    assert headers.missing_bytes > 0


def test_what_is_transient_among_its_errors_is_tried_again(shelf: Shelf, events: list[Event]) -> None:
    shelf.failures = [TimeoutError("slow"), ConnectionResetError("gone")]
    assert resolve("shelf:tiny").weights[0].read_bytes() == SHARD
    assert len(named(events, "source.retry")) == 2


def test_what_is_not_is_told_with_the_file_that_it_was_about(shelf: Shelf, events: list[Event]) -> None:
    shelf.failures = [KeyError("oops")]
    with pytest.raises(SourceError, match=r"Could not fetch config\.json of shelf:tiny: KeyError: 'oops'"):
        resolve("shelf:tiny")
    assert named(events, "source.retry") == []


def test_a_place_without_parts_is_read_from_the_start(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.files = {"model.gguf": SHARD}
    read = shelf.read

    def half(file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        yield from read(file, start, 1000)
        raise TimeoutError("slow")

    monkeypatch.setattr(shelf, "read", half)
    with pytest.raises(TransientSourceError):
        resolve("shelf:tiny", retry=RetryConfig(max_attempts=1))
    monkeypatch.setattr(shelf, "read", read)
    shelf.failures = [NoPartsError("whole files only")]
    assert resolve("shelf:tiny").weights[0].read_bytes() == SHARD
    assert shelf.read_from == [0, 1000, 0]


@pytest.mark.parametrize("name", ["shelf:", "shelf:a//b", "shelf:../x", "shelf:a b", "shelf:x@../y"])
def test_a_path_that_cannot_be_one_is_refused(shelf: Shelf, name: str) -> None:
    with pytest.raises(ConfigurationError):
        resolve(name)


class Broken(Source):
    """A source that fails as code that nobody tested does."""

    name = "broken"
    summary = "nothing"

    def resolve(self, model: str, terms: Terms) -> ModelFiles:
        raise ZeroDivisionError("by chance")


def test_a_source_that_raises_is_an_error_that_names_it(cache: Path, small_model: Path) -> None:
    register_source(Broken())
    for ask in (resolve, resolve_headers):
        with pytest.raises(SourceError, match="the source 'broken' failed: ZeroDivisionError: by chance"):
            ask("broken:model")
    assert resolve(str(small_model)).name == "small-model"


@pytest.mark.parametrize("name", ["c", "Shelf", "my-shelf", "a b"])
def test_a_name_that_cannot_stand_before_a_colon_is_no_sources(name: str) -> None:
    made = type("Made", (Broken,), {"name": name})
    with pytest.raises(TypeError, match="before a colon"):
        SOURCES._admit(name, made)


@pytest.mark.parametrize(
    "listing",
    [
        lambda file: Listing("../../evil", {"a": file}),
        lambda file: Listing("0" * 40, {"a": RemoteFile("a", 1, "../../evil")}),
        lambda file: Listing.of([RemoteFile("a", 1.5, "0" * 64)]),  # type: ignore[arg-type]
        lambda file: Listing("0" * 40, {str(number): file for number in range(100_001)}),
    ],
    ids=["commit", "identity", "size", "many"],
)
def test_what_a_place_lists_cannot_lead_out_of_the_cache(listing: Callable[[RemoteFile], Listing]) -> None:
    with pytest.raises(SourceError, match="listed"):
        listing(RemoteFile("a", 1, "0" * 64))
