"""Models from a Hub, against a fake one on loopback: what is fetched, what is retried, what is refused."""

from __future__ import annotations

import email.utils
import json
import threading
import time
from pathlib import Path

import pytest
from fake_hub import FILES, SHARD, TOKEN, FakeHub, closed_port

from loadstone.config import RetryConfig
from loadstone.errors import (
    CheckpointError,
    ConfigurationError,
    ResourceError,
    SourceError,
    TransientSourceError,
)
from loadstone.sources import ModelFiles, resolve
from loadstone.telemetry import Event, subscribe

MODEL = FakeHub.repository
NEEDED = sorted(set(FILES) - {"README.md", "pytorch_model.bin", "onnx/model.onnx"})


def named(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event.name == name]


def indexed(**shards: bytes) -> dict[str, bytes]:
    """Return the files of a sharded checkpoint."""
    files = {f"{name}.safetensors": data for name, data in shards.items()}
    weight_map = {f"tensor{number}": name for number, name in enumerate(files)}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {"config.json": b"{}", "model.safetensors.index.json": index, **files}


# What is fetched


def test_only_the_files_that_are_needed_are_fetched(hub: FakeHub) -> None:
    files = resolve(MODEL)
    assert sorted(path.name for path in files.folder.iterdir()) == NEEDED
    assert sorted(one.path.rpartition("/")[2] for one in hub.asked_for("/resolve/")) == NEEDED


def test_the_files_carry_the_name_the_origin_and_the_commit(hub: FakeHub) -> None:
    files = resolve(MODEL)
    assert files == ModelFiles(
        name=MODEL,
        folder=files.folder,
        weights=(files.folder / "model.safetensors",),
        origin=f"Hub: {MODEL} at {hub.endpoint}",
        revision=hub.commit,
    )
    assert files.weights[0].read_bytes() == SHARD


def test_all_shards_of_the_index_and_no_other_weights_are_fetched(hub: FakeHub) -> None:
    hub.files = indexed(a=b"one", b=b"two") | {"consolidated.safetensors": b"the same again"}
    assert [path.name for path in resolve(MODEL).weights] == ["a.safetensors", "b.safetensors"]
    assert not hub.asked_for("consolidated")


def test_progress_is_told_by_events_up_to_the_last_byte(hub: FakeHub, events: list[Event]) -> None:
    resolve(MODEL)
    told = [event.fields for event in named(events, "download.progress")]
    weights = [one for one in told if one["file"] == "model.safetensors"]
    assert weights[-1] == {"file": "model.safetensors", "done": len(SHARD), "total": len(SHARD)}
    assert [one["done"] for one in weights] == sorted(one["done"] for one in weights)


def test_a_second_time_nothing_is_fetched_again(hub: FakeHub) -> None:
    first = resolve(MODEL)
    hub.asked.clear()
    assert resolve(MODEL) == first
    assert [one.path for one in hub.asked] == [f"/api/models/{MODEL}"]


def test_a_cached_commit_is_used_without_asking(hub: FakeHub) -> None:
    first = resolve(MODEL, revision=hub.commit)
    hub.asked.clear()
    assert resolve(f"{MODEL}@{hub.commit}") == first
    assert hub.asked == []


def test_a_commit_that_another_program_fetched_in_part_is_completed(hub: FakeHub) -> None:
    first = resolve(MODEL, revision=hub.commit)
    (first.folder / "tokenizer.json").unlink()
    assert (resolve(MODEL, revision=hub.commit).folder / "tokenizer.json").is_file()


def test_the_cache_works_on_disks_without_symbolic_links(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no symbolic links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    files = resolve(MODEL)
    assert not files.weights[0].is_symlink()
    hub.asked.clear()
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert hub.asked_for("/resolve/") == []


def test_a_branch_that_moved_is_followed_and_unchanged_files_are_not_fetched(hub: FakeHub) -> None:
    before = resolve(MODEL)
    hub.files["config.json"] = b'{"new": true}'
    hub.asked.clear()
    after = resolve(MODEL)
    assert after.revision == hub.commit != before.revision
    assert [one.path.rpartition("/")[2] for one in hub.asked_for("/resolve/")] == ["config.json"]
    assert (after.folder / "config.json").read_bytes() == b'{"new": true}'


def test_the_revision_is_asked_for_wherever_it_is_said(hub: FakeHub) -> None:
    resolve(MODEL, revision="v1")
    resolve(f"{MODEL}@v1")
    assert len(hub.asked_for(f"/api/models/{MODEL}/revision/v1")) == 2


@pytest.mark.parametrize("revision", ["../../etc", "a b", "", "x/../y"])
def test_a_revision_that_cannot_be_one_is_refused_before_anything_is_asked(hub: FakeHub, revision: str) -> None:
    with pytest.raises(ConfigurationError):
        resolve(MODEL, revision=revision)
    assert hub.asked == []


def test_two_different_revisions_contradict_each_other(hub: FakeHub) -> None:
    with pytest.raises(ConfigurationError, match="another"):
        resolve(f"{MODEL}@v1", revision="v2")


def test_other_programs_find_the_files_in_the_cache(hub: FakeHub, cache: Path) -> None:
    """The layout is the Hub's own: its library finds what was fetched here."""
    import huggingface_hub

    files = resolve(MODEL)
    found = huggingface_hub.try_to_load_from_cache(MODEL, "model.safetensors", cache_dir=cache)
    assert Path(str(found)) == files.weights[0]


# GGUF repositories


def test_of_several_gguf_files_q4_k_m_is_taken_alone(hub: FakeHub, events: list[Event]) -> None:
    hub.files = {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight", "mmproj-m.gguf": b"eyes"}
    assert resolve(MODEL).weights[0].name == "m-Q4_K_M.gguf"
    assert len(hub.asked_for("/resolve/")) == 1
    assert named(events, "source.choice")[0].fields["file"] == "m-Q4_K_M.gguf"


def test_a_gguf_file_is_chosen_by_its_variant(hub: FakeHub) -> None:
    hub.files = {"m-Q4_K_M.gguf": b"four", "m-Q8_0.gguf": b"eight"}
    assert resolve(f"{MODEL}:q8_0").weights[0].name == "m-Q8_0.gguf"


def test_gguf_files_that_nothing_chooses_between_are_listed(hub: FakeHub) -> None:
    hub.files = {"m-Q5_0.gguf": b"five", "m-Q8_0.gguf": b"eight"}
    with pytest.raises(CheckpointError, match=r"m-Q5_0\.gguf, m-Q8_0\.gguf"):
        resolve(MODEL)


# What is retried


def test_503_twice_then_fine(hub: FakeHub, events: list[Event]) -> None:
    hub.fault("/api/models", status=503, times=2)
    resolve(MODEL)
    assert len(hub.asked_for("/api/models")) == 3
    retries = named(events, "source.retry")
    assert [event.fields["attempt"] for event in retries] == [1, 2]
    assert "503" in retries[0].fields["reason"]


def test_503_while_a_file_is_fetched_is_retried_too(hub: FakeHub) -> None:
    hub.fault("model.safetensors", status=503, times=2)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD


def test_the_configured_number_of_attempts_is_the_limit(hub: FakeHub) -> None:
    hub.fault("/api/models", status=500, times=99)
    with pytest.raises(TransientSourceError, match="500"):
        resolve(MODEL, retry=RetryConfig(max_attempts=5))
    assert len(hub.asked_for("/api/models")) == 5


def test_a_reset_in_mid_file_is_resumed_from_where_it_broke(hub: FakeHub) -> None:
    arrived = threading.Event()
    stop = subscribe(lambda event: arrived.set() if event.fields.get("file") == "model.safetensors" else None)
    hub.fault("model.safetensors", reset_after=100_000, before_reset=lambda: arrived.wait(10))
    try:
        files = resolve(MODEL)
    finally:
        stop()
    starts = [one.start for one in hub.asked_for("model.safetensors")]
    assert starts[0] is None
    assert starts[1] is not None
    assert 0 < starts[1] <= 100_000
    assert files.weights[0].read_bytes() == SHARD


def test_what_an_earlier_process_left_is_resumed(hub: FakeHub, cache: Path) -> None:
    partial = leave_partial(hub, cache, SHARD[:5000])
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert [one.start for one in hub.asked_for("model.safetensors")] == [5000]
    assert not partial.exists()


def test_a_partial_file_that_is_already_whole_is_not_asked_for(hub: FakeHub, cache: Path) -> None:
    leave_partial(hub, cache, SHARD)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert hub.asked_for("model.safetensors") == []


@pytest.mark.parametrize("wrong", [b"other bytes", SHARD + b"and more"], ids=["other", "longer"])
def test_a_partial_file_with_other_content_is_fetched_from_its_start(hub: FakeHub, cache: Path, wrong: bytes) -> None:
    leave_partial(hub, cache, wrong)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert hub.asked_for("model.safetensors")[-1].start is None


def test_a_server_that_ignores_the_range_is_read_from_the_start(hub: FakeHub, cache: Path) -> None:
    leave_partial(hub, cache, SHARD[:5000])
    hub.fault("model.safetensors", ignores_range=True)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert len(hub.asked_for("model.safetensors")) == 1


def leave_partial(hub: FakeHub, cache: Path, content: bytes) -> Path:
    lfs = next(one for one in hub.listing()["siblings"] if one["rfilename"] == "model.safetensors")["lfs"]  # type: ignore[attr-defined, index]
    partial = cache / "models--org--model" / "blobs" / f"{lfs['sha256']}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-7], lambda data: data + b"more", lambda data: b"X" + data[1:], lambda data: b""],
    ids=["short", "long", "damaged", "empty"],
)
def test_content_of_the_wrong_size_or_hash_is_fetched_again(hub: FakeHub, change: object) -> None:
    hub.fault("model.safetensors", change=change)
    assert resolve(MODEL).weights[0].read_bytes() == SHARD
    assert [one.start for one in hub.asked_for("model.safetensors")] == [None, None]


def test_content_that_stays_wrong_is_never_accepted(hub: FakeHub, cache: Path) -> None:
    hub.fault("model.safetensors", change=lambda data: data[:-7], times=99)
    with pytest.raises(SourceError, match="ended after"):
        resolve(MODEL)
    assert len(hub.asked_for("model.safetensors")) == 3
    assert not any(path.name == "model.safetensors" for path in cache.rglob("*"))
    with pytest.raises(SourceError):
        resolve(MODEL, offline=True)


def test_small_files_are_held_to_their_hash_as_well(hub: FakeHub) -> None:
    hub.fault("config.json", change=lambda data: data.replace(b"Llama", b"Evil!"))
    assert (resolve(MODEL).folder / "config.json").read_bytes() == FILES["config.json"]


def test_a_truncated_file_in_the_cache_is_fetched_again(hub: FakeHub) -> None:
    weights = resolve(MODEL).weights[0]
    weights.resolve().write_bytes(SHARD[:-1])
    assert resolve(MODEL).weights[0].read_bytes() == SHARD


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
def test_the_wait_that_a_429_asks_for_is_honoured(hub: FakeHub, events: list[Event], header: str) -> None:
    value = {"Retry-After": "41", "RateLimit": '"api";r=0;t=41'}[header]
    hub.fault("/api/models", status=429, headers={header: value})
    resolve(MODEL)
    assert named(events, "source.retry")[0].fields["wait"] == 41.0


def test_a_wait_may_be_asked_for_as_a_date(hub: FakeHub, events: list[Event]) -> None:
    soon = email.utils.formatdate(time.time() + 60, usegmt=True)
    hub.fault("model.safetensors", status=503, headers={"Retry-After": soon})
    resolve(MODEL)
    assert 30 < named(events, "source.retry")[0].fields["wait"] <= 60


# What is refused


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "", "hf auth login"),
        (403, "", "hf auth login"),
        (403, "GatedRepo", "Accept its licence"),
        (404, "RepoNotFound", "Check the name"),
        (404, "RevisionNotFound", "no such revision"),
        (418, "", "418"),
    ],
)
@pytest.mark.parametrize("part", ["/api/models", "model.safetensors"])
def test_a_refusal_is_said_with_its_remedy_and_never_retried(
    hub: FakeHub, status: int, code: str, says: str, part: str
) -> None:
    hub.fault(part, status=status, headers={"X-Error-Code": code}, times=99)
    with pytest.raises(SourceError, match=says) as caught:
        resolve(MODEL)
    assert not isinstance(caught.value, TransientSourceError)
    assert MODEL in str(caught.value)
    assert len(hub.asked_for(part)) == 1


def test_a_page_that_is_not_a_hub_is_said_to_be_none(hub: FakeHub) -> None:
    hub.fault("/api/models", status=200)
    with pytest.raises(SourceError, match="did not answer as it should"):
        resolve(MODEL)


def test_only_pickled_weights_are_refused_before_any_is_fetched(hub: FakeHub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    with pytest.raises(CheckpointError, match="a pickle is never opened"):
        resolve(MODEL)
    assert hub.asked_for("/resolve/") == []


def test_an_index_that_leaves_its_folder_is_refused(hub: FakeHub) -> None:
    index = json.dumps({"weight_map": {"t": "../../x.safetensors"}}).encode()
    hub.files = {"config.json": b"{}", "model.safetensors.index.json": index}
    with pytest.raises(CheckpointError, match=r"\.\./\.\./x"):
        resolve(MODEL)


def test_a_shard_that_the_repository_lacks_is_named_before_any_is_fetched(hub: FakeHub) -> None:
    hub.files = indexed(a=b"one", b=b"two")
    del hub.files["b.safetensors"]
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        resolve(MODEL)
    assert hub.asked_for("a.safetensors") == []


def test_a_repository_that_is_larger_than_the_disk_is_refused_before_any_weight_is_fetched(
    hub: FakeHub,
) -> None:
    hub.claimed_sizes["model.safetensors"] = 10**18
    with pytest.raises(ResourceError, match="HF_HOME") as caught:
        resolve(MODEL)
    assert caught.value.needed is not None
    assert caught.value.allowed is not None
    assert caught.value.needed >= 10**18 > caught.value.allowed
    assert hub.asked_for("/resolve/") == []


def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: FakeHub, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    hub.fault("model.safetensors", status=503)
    hub.fault("model.safetensors", status=403, headers={"X-Error-Message": "not yours"})
    with pytest.raises(SourceError) as caught:
        resolve(MODEL)
    assert all(one.authorization == f"Bearer {TOKEN}" for one in hub.asked)
    assert TOKEN not in f"{caught.value} {caught.value.__dict__} {events} {caplog.text}"


# Offline, and out of reach


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_uses_the_cached_copy_and_asks_nothing(hub: FakeHub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online = resolve(MODEL)
    hub.asked.clear()
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(MODEL, offline=how == "argument") == online
    assert hub.asked == []


def test_offline_without_a_cached_copy_says_where_it_looked(hub: FakeHub, cache: Path) -> None:
    with pytest.raises(SourceError, match="offline was asked for") as caught:
        resolve(MODEL, offline=True)
    assert str(cache) in str(caught.value)
    assert hub.asked == []


def test_offline_with_half_a_copy_names_what_is_missing(hub: FakeHub) -> None:
    hub.files = indexed(a=b"one", b=b"two")
    files = resolve(MODEL)
    files.weights[1].unlink()
    with pytest.raises(SourceError, match=r"b\.safetensors"):
        resolve(MODEL, offline=True)


def test_an_interrupted_download_is_not_taken_for_a_copy(hub: FakeHub) -> None:
    hub.fault("model.safetensors", status=403)
    with pytest.raises(SourceError):
        resolve(MODEL)
    with pytest.raises(SourceError, match="copy is in the cache"):
        resolve(MODEL, offline=True)


def test_without_a_route_the_cached_copy_is_used_with_a_warning_and_no_waits(
    hub: FakeHub, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = resolve(MODEL)
    with closed_port() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert resolve(MODEL).weights == online.weights
    assert "no route" in named(events, "source.warning")[0].fields["message"]
    assert named(events, "source.retry") == []


def test_a_hub_that_is_down_leaves_the_cached_copy_usable(hub: FakeHub, events: list[Event]) -> None:
    online = resolve(MODEL)
    hub.fault("/api/models", status=503, times=99)
    assert resolve(MODEL) == online
    assert len(named(events, "source.retry")) == 2
    assert len(named(events, "source.warning")) == 1


def test_without_a_route_or_a_copy_the_error_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(SourceError, match=f"no route to {endpoint}"):
            resolve(MODEL)


def test_a_hub_that_says_no_is_not_papered_over_by_the_cached_copy(hub: FakeHub) -> None:
    resolve(MODEL)
    hub.fault("/api/models", status=404)
    with pytest.raises(SourceError, match="does not exist"):
        resolve(MODEL)


def test_a_stalled_connection_is_given_up_and_resumed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.sources import http

    monkeypatch.setattr(http, "STALL_SECONDS", 0.2)
    done = threading.Event()
    hub.fault("model.safetensors", reset_after=100_000, before_reset=lambda: done.wait(10))
    files = resolve(MODEL)
    done.set()
    assert files.weights[0].read_bytes() == SHARD
    assert hub.asked_for("model.safetensors")[1].start == 100_000


# Mirrors, tokens and redirects


def test_a_mirror_below_a_path_is_asked_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = hub.answer
    monkeypatch.setattr(hub, "answer", lambda path, query: answer(path.removeprefix("/mirror"), query))
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/mirror/")
    assert resolve(MODEL).origin == f"Hub: {MODEL} at {hub.endpoint}/mirror"
    assert all(one.path.startswith("/mirror/") for one in hub.asked)


def test_the_token_comes_from_where_the_hub_keeps_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A private repository is fetched after `hf auth login`, which writes this file."""
    import huggingface_hub.constants

    (tmp_path / "token").write_text("hf_kept\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    resolve(MODEL)
    assert {one.authorization for one in hub.asked} == {"Bearer hf_kept"}


def test_files_on_another_host_are_fetched_there_without_the_token(hub: FakeHub) -> None:
    with FakeHub(FILES) as storage:
        place = f"{storage.endpoint}/{MODEL}/resolve/{storage.commit}/model.safetensors"
        hub.fault("model.safetensors", status=302, headers={"Location": place})
        assert resolve(MODEL).weights[0].read_bytes() == SHARD
    (asked,) = storage.asked
    assert asked.authorization is None


def test_a_repository_that_moved_is_followed_with_the_token(hub: FakeHub) -> None:
    hub.fault("/api/models", status=307, headers={"Location": f"/api/models/{MODEL}/revision/main"})
    resolve(MODEL)
    (moved,) = hub.asked_for("/revision/main")
    assert moved.authorization == f"Bearer {TOKEN}"


@pytest.mark.parametrize("part", ["/api/models", "model.safetensors"])
def test_a_redirect_to_another_scheme_is_refused(hub: FakeHub, part: str) -> None:
    hub.fault(part, status=302, headers={"Location": "ftp://127.0.0.1/x"}, times=99)
    with pytest.raises(SourceError, match="redirects from http to ftp, which is not followed"):
        resolve(MODEL)
    assert len(hub.asked_for(part)) == 1


def test_a_gated_repository_names_the_page_with_its_licence(hub: FakeHub) -> None:
    hub.fault("model.safetensors", status=403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(SourceError, match=f"Accept its licence at {hub.endpoint}/{MODEL}, then `hf auth login`"):
        resolve(MODEL)


@pytest.mark.parametrize("name", ["..\\evil.safetensors", "C:evil.safetensors"])
def test_a_listed_name_that_leaves_its_folder_is_refused(hub: FakeHub, name: str) -> None:
    hub.files = {"config.json": b"{}", name: b"evil"}
    with pytest.raises(CheckpointError, match="must lie in the folder"):
        resolve(MODEL)


def test_a_listing_without_end_is_not_read_to_it(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.sources.hub.LARGEST_LISTING", 100)
    with pytest.raises(SourceError, match="more than 100 bytes"):
        resolve(MODEL)
