"""What only ModelScope has: its interface, its login, and what its own library fetched before."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_hub import FILES, SHARD, TOKEN, FakeModelScope
from test_sources_hub import named

from loadstone.config import RetryConfig
from loadstone.errors import CheckpointError, ConfigurationError, SourceError
from loadstone.sources import _modelscope, http, resolve
from loadstone.telemetry import Event

MODEL = "modelscope:org/model"
ONCE = RetryConfig(max_attempts=1)
PATH = "/api/v1/models/org/model/repo"


def test_the_file_interface_is_asked_for_one_folder_at_master(modelscope: FakeModelScope) -> None:
    files = resolve(MODEL)
    listing, *rest = modelscope.asked
    assert (listing.path, dict(listing.query)) == (f"{PATH}/files", {"Revision": "master", "Recursive": "False"})
    assert {one.path for one in rest} == {PATH}
    assert {one.query["Revision"] for one in rest} == {"master"}
    assert files.origin == f"ModelScope: org/model at {modelscope.endpoint}"


def test_a_revision_and_a_variant_are_said_as_for_the_hub(modelscope: FakeModelScope) -> None:
    modelscope.files = {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    assert resolve(f"{MODEL}:Q8_0@v1").weights[0].read_bytes() == b"eight"
    assert {one.query["Revision"] for one in modelscope.asked} == {"v1"}
    assert resolve(MODEL, revision="v1").weights[0].read_bytes() == b"four"


def test_a_revision_that_is_not_there_is_told(modelscope: FakeModelScope) -> None:
    with pytest.raises(SourceError, match="org/model@v9 at ModelScope does not exist"):
        resolve(f"{MODEL}@v9")


@pytest.mark.parametrize("name", ["model", "a/b/c", "", "org/", "../model", "org/model@a b", "org/../x"])
def test_what_cannot_be_a_name_is_refused_before_anything_is_asked(modelscope: FakeModelScope, name: str) -> None:
    with pytest.raises(ConfigurationError):
        resolve(f"modelscope:{name}")
    assert modelscope.asked == []


def test_a_bare_address_is_taken_for_https(monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.sources.modelscope import endpoint

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "modelscope.ai/")
    assert endpoint() == "https://modelscope.ai"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", " ")
    assert endpoint() == "https://modelscope.cn"


# Who asks


def test_the_token_goes_with_every_request_in_both_forms(modelscope: FakeModelScope) -> None:
    resolve(MODEL)
    assert all(one.authorization == f"Bearer {TOKEN}" for one in modelscope.asked)
    assert all(one.headers["cookie"] == f"m_session_id={TOKEN}" for one in modelscope.asked)
    assert all(one.headers["user-agent"].startswith("loadstone/") for one in modelscope.asked)


def test_the_login_of_its_library_is_used(modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelscope_hub import HubConfig

    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    HubConfig().save_token("ms-kept")
    resolve(MODEL)
    assert {one.authorization for one in modelscope.asked} == {"Bearer ms-kept"}


@pytest.mark.parametrize("has_library", [True, False])
def test_without_a_token_none_is_sent(
    modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch, has_library: bool
) -> None:
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    monkeypatch.setattr(_modelscope, "is_installed", lambda: has_library)
    resolve(MODEL)
    assert not any(one.authorization or "cookie" in one.headers for one in modelscope.asked)


def test_the_library_says_nothing_on_its_own(modelscope: FakeModelScope, capfd: pytest.CaptureFixture[str]) -> None:
    keep_in_library(modelscope.files)
    resolve(MODEL)
    assert capfd.readouterr() == ("", "")


# What its library fetched before


def keep_in_library(files: dict[str, bytes], revision: str = "master") -> Path:
    """Put files where ModelScope's library keeps those of a model, by that library's own word."""
    from modelscope_hub import HubConfig

    folder = HubConfig().cache_dir / "models" / "org--model" / "snapshots" / revision
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_its_library_has_is_not_fetched_again(modelscope: FakeModelScope, events: list[Event]) -> None:
    keep_in_library(FILES)
    files = resolve(MODEL)
    assert files.weights[0].read_bytes() == SHARD
    assert [one.path for one in modelscope.asked] == [f"{PATH}/files"]
    assert {event.fields["file"] for event in named(events, "source.adopted")} >= {"model.safetensors", "config.json"}
    assert named(events, "source.download") == []


def test_what_its_library_replaces_later_stays_what_it_was(modelscope: FakeModelScope) -> None:
    theirs = keep_in_library(FILES) / "model.safetensors"
    files = resolve(MODEL)
    theirs.with_name("new").write_bytes(SHARD[::-1])
    os.replace(theirs.with_name("new"), theirs)
    assert files.weights[0].read_bytes() == SHARD


def test_what_its_library_has_of_another_content_is_not_believed(modelscope: FakeModelScope) -> None:
    keep_in_library(FILES | {"model.safetensors": SHARD[::-1], "config.json": b"longer than it was at first, by far"})
    files = resolve(MODEL)
    assert files.weights[0].read_bytes() == SHARD
    assert (files.folder / "config.json").read_bytes() == FILES["config.json"]


def test_what_cannot_be_linked_is_fetched(modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("another disk")

    keep_in_library(FILES)
    monkeypatch.setattr(os, "link", refuse)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert len(modelscope.asked) > 1


# Answers that are none


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in to this network</html>",
        b"[]",
        b'{"Code": 200}',
        b'{"Code": 200, "Data": {"Files": [{"Name": "model.safetensors"}]}}',
        b'{"Code": 200, "Data": {"Files": [7]}}',
        b'{"Code": 500, "Message": "it is late"}',
        b"[" * 100_000,
    ],
    ids=lambda answer: str(answer[:40]),
)
def test_what_is_no_listing_is_said_to_be_none(
    modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    from tests.sources.fake_server import Answer

    monkeypatch.setattr(modelscope, "answer", lambda path, query: Answer(200, answer))
    with pytest.raises(SourceError, match="did not answer as it should"):
        resolve(MODEL, retry=ONCE)


@pytest.mark.parametrize(
    ("size", "sha256"), [(-1, "0" * 64), ("1", "0" * 64), (2**63, "0" * 64), (1, ""), (1, "z" * 64)]
)
def test_a_size_or_hash_that_cannot_be_one_is_refused(
    modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch, size: object, sha256: str
) -> None:
    entry = {"Path": "model.safetensors", "Type": "blob", "Size": size, "Sha256": sha256}
    monkeypatch.setattr(modelscope, "_entry", lambda name: entry)
    with pytest.raises(SourceError, match="is listed with"):
        resolve(MODEL)


@pytest.mark.parametrize("name", ["..\\evil.safetensors", "C:evil.safetensors", "a\x00.safetensors"])
def test_a_name_that_leaves_its_folder_is_refused(modelscope: FakeModelScope, name: str) -> None:
    modelscope.files = {"config.json": b"{}", name: b"evil"}
    with pytest.raises(CheckpointError, match="must lie in the folder"):
        resolve(MODEL)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "a/../../evil.safetensors"])
def test_a_path_is_no_file_of_the_folder(
    modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    entry = {"Path": name, "Type": "blob", "Size": 4, "Sha256": "0" * 64}
    monkeypatch.setattr(modelscope, "_entry", lambda _: entry)
    with pytest.raises(CheckpointError, match="no weights are there"):
        resolve(MODEL)


def test_a_listing_without_end_is_not_read_to_it(modelscope: FakeModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.sources.modelscope.LARGEST_LISTING", 100)
    with pytest.raises(SourceError, match="more than 100 bytes"):
        resolve(MODEL)


# Redirects


def test_files_on_another_host_are_fetched_there_without_the_token(modelscope: FakeModelScope) -> None:
    with FakeModelScope(FILES) as storage:
        place = f"{storage.endpoint}{PATH}?Revision=master&FilePath=model.safetensors"
        modelscope.fault("FilePath=model.safetensors", status=302, headers={"Location": place}, times=9)
        assert resolve(MODEL).weights[0].read_bytes() == SHARD
    (asked,) = storage.asked
    assert asked.authorization is None
    assert "cookie" not in asked.headers
    assert asked.headers["user-agent"].startswith("loadstone/")


def test_a_redirect_within_the_host_keeps_the_token(modelscope: FakeModelScope) -> None:
    modelscope.fault(
        "FilePath=config.json", status=307, headers={"Location": f"{PATH}?Revision=v1&FilePath=config.json"}
    )
    resolve(MODEL)
    (moved,) = [one for one in modelscope.asked if one.query.get("Revision") == "v1"]
    assert moved.authorization == f"Bearer {TOKEN}"


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "//", "javascript:x"])
def test_a_redirect_to_another_scheme_is_refused(modelscope: FakeModelScope, place: str) -> None:
    modelscope.fault("FilePath=config.json", status=302, headers={"Location": place}, times=9)
    with pytest.raises(SourceError, match=r"redirects|cannot be asked"):
        resolve(MODEL, retry=ONCE)


def test_redirects_in_a_circle_end(modelscope: FakeModelScope) -> None:
    modelscope.fault("/repo/files", status=302, headers={"Location": f"{PATH}/files"}, times=99)
    with pytest.raises(SourceError, match=f"redirects more than {http.MOST_REDIRECTS} times"):
        resolve(MODEL, retry=ONCE)
    assert len(modelscope.asked) == http.MOST_REDIRECTS + 1


def test_the_listing_is_what_the_interface_was_seen_to_answer(modelscope: FakeModelScope) -> None:
    """What the fake answers has the names and types that ModelScope's own library reads."""
    answer = json.loads(modelscope.answer(f"{PATH}/files", {"Revision": "master"}).body)
    from modelscope_hub import HubApi, HubConfig

    listed = HubApi(HubConfig()).list_repo_files("org/model", "model")
    assert {(one.path, one.size, one.sha256) for one in listed if not one.is_dir} == {
        (one["Path"], one["Size"], one["Sha256"]) for one in answer["Data"]["Files"] if one["Type"] != "tree"
    }
