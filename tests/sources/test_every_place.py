"""What is so for every kind of place that files are fetched from: each test runs against a server of each kind."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from fake_hub import FILES, SHARD, TOKEN, closed_port
from test_headers import small_model
from test_sources_hub import NEEDED, named
from tests.sources.fake_server import Place, sums

from loadstone.checkpoint import inspect
from loadstone.config import RetryConfig
from loadstone.errors import CheckpointError, ResourceError, SourceError, TransientSourceError
from loadstone.sources import fetched_weights, resolve, resolve_headers
from loadstone.sources.cache import FileCache
from loadstone.telemetry import Event, subscribe

ONCE = RetryConfig(max_attempts=1)


def weights_asked(place: Place) -> list[int | None]:
    """Return where the requests for bytes of the weights began; asking for the size does not count."""
    asked = [one for one in place.server.asked if "model.safetensors" in f"{one.path} {one.query.get('FilePath')}"]
    return [one.start or 0 for one in asked if one.method == "GET" and one.headers.get("range") != "bytes=0-0"]


def put(place: Place, files: Mapping[str, bytes]) -> None:
    """Have other files be there, with a list of checksums where there was one."""
    has_list = "SHA256SUMS" in place.server.files
    place.server.files = {**files, **({"SHA256SUMS": sums(files)} if has_list else {})}


# What is fetched


def test_only_what_is_needed_is_fetched_and_it_is_what_lies_there(place: Place) -> None:
    files = resolve(place.model)
    assert sorted(path.name for path in files.folder.iterdir()) == NEEDED
    assert {path.name: path.read_bytes() for path in files.folder.iterdir()} == {name: FILES[name] for name in NEEDED}
    assert [path.name for path in files.weights] == ["model.safetensors"]
    assert files.name == place.model.rstrip("/")
    assert files.revision is not None
    assert len(files.revision) == 40


def test_a_second_time_no_file_is_fetched_again(place: Place) -> None:
    first = resolve(place.model)
    place.server.asked.clear()
    before = place.server.sent
    assert resolve(place.model) == first
    assert weights_asked(place) == []
    assert place.server.sent - before < 4096  # lists


def test_what_changed_is_fetched_and_what_did_not_is_not(place: Place) -> None:
    before = resolve(place.model)
    put(place, FILES | {"config.json": b'{"new": true}'})
    place.server.asked.clear()
    after = resolve(place.model)
    assert after.revision != before.revision
    assert (after.folder / "config.json").read_bytes() == b'{"new": true}'
    assert (before.folder / "config.json").read_bytes() == FILES["config.json"]
    assert weights_asked(place) == []


def test_progress_is_told_up_to_the_last_byte(place: Place, events: list[Event]) -> None:
    resolve(place.model)
    told = [event.fields for event in named(events, "download.progress")]
    assert {"file": "model.safetensors", "done": len(SHARD), "total": len(SHARD)} in told
    (download,) = named(events, "source.download")
    assert download.fields["bytes"] == sum(len(FILES[name]) for name in NEEDED)


def test_several_threads_fetch_a_file_once(place: Place) -> None:
    """What holds for two processes too: the lock is of the file system."""
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(place.model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert weights_asked(place) == [0]


# Plans without a download


def test_headers_are_read_without_the_weights(place: Place) -> None:
    files = small_model()
    put(place, files | {"model.safetensors": files["model.safetensors"] + bytes(8 * 2**20)})
    headers = resolve_headers(place.model)
    with pytest.raises(CheckpointError, match="belong to no tensor"):  # of what was appended; the header was read
        inspect(headers.files, headers.remote)
    assert headers.file_bytes == len(place.server.files["model.safetensors"])
    assert headers.missing_bytes >= headers.file_bytes
    assert place.server.sent < 100_000


# What goes wrong


def test_what_fails_for_a_passing_reason_is_tried_again(place: Place, events: list[Event]) -> None:
    place.server.fault("model.safetensors", status=503)
    place.server.fault("config.json", status=503)
    assert resolve(place.model).weights[0].read_bytes() == SHARD
    assert all(re.search("503|Unavailable", event.fields["reason"]) for event in named(events, "source.retry"))
    assert named(events, "source.retry")


def test_a_reset_in_mid_file_is_resumed_from_where_it_broke(place: Place) -> None:
    """Of S3 whole blocks are read, so there the one that broke is asked for again."""
    arrived = threading.Event()

    def follow(event: Event) -> None:
        if event.fields.get("file") == "tokenizer_config.json" and not place.server.faults:
            wait = (lambda: None) if place.setting == "AWS_ENDPOINT_URL" else lambda: arrived.wait(10)
            place.server.fault("model.safetensors", reset_after=100_000, before_reset=wait)
        if event.fields.get("file") == "model.safetensors":
            arrived.set()

    stop = subscribe(follow)
    try:
        assert resolve(place.model).weights[0].read_bytes() == SHARD
    finally:
        stop()
    first, second = weights_asked(place)
    assert first == 0
    assert second <= 100_000
    assert (second > 0) == (place.setting != "AWS_ENDPOINT_URL")


def test_a_partial_file_is_resumed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = leave_partial(place, SHARD[:5000], monkeypatch)
    place.server.asked.clear()
    assert resolve(place.model).weights[0].read_bytes() == SHARD
    assert weights_asked(place) == [5000]
    assert not partial.exists()


def leave_partial(place: Place, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave what a process that was killed leaves: a part of the weights."""
    seen: list[FileCache] = []
    with monkeypatch.context() as watched:
        watched.setattr(FileCache, "bytes_missing", lambda self, *_: seen.append(self) or 10**18)  # type: ignore[func-returns-value]
        with pytest.raises(ResourceError):
            resolve(place.model)
    partial = seen[0].folder / "blobs" / f"{hashlib.sha256(SHARD).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-7], lambda data: data + b"more", lambda data: b"X" + data[1:], lambda data: b""],
    ids=["short", "long", "damaged", "empty"],
)
def test_content_that_stays_wrong_is_never_accepted(place: Place, change: object) -> None:
    place.server.fault("model.safetensors", change=change, times=99)
    with pytest.raises(SourceError):
        resolve(place.model)
    with pytest.raises(SourceError, match="copy is in the cache"):
        resolve(place.model, offline=True)


def test_what_is_larger_than_the_disk_is_refused_before_any_weight_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadstone.sources.fetch.free_bytes", lambda folder: 1000)
    with pytest.raises(ResourceError, match="1 KB are free") as caught:
        resolve(place.model)
    assert "HF_HOME" in str(caught.value) or "LOADSTONE_HOME" in str(caught.value)
    assert weights_asked(place) == []


def test_a_refusal_is_not_tried_again_and_says_what_to_do(place: Place) -> None:
    place.server.fault("", status=403, times=99)
    with pytest.raises(SourceError, match="is not shown to you") as caught:
        resolve(place.model)
    assert not isinstance(caught.value, TransientSourceError)
    assert caught.value.hint
    assert len(place.server.asked) == 1


def test_a_model_that_is_not_there_is_told_so(place: Place) -> None:
    with pytest.raises(SourceError, match=r"does not exist|has no SHA256SUMS"):
        resolve(re.sub("/model$|/tiny", "/another", place.model))


def test_secrets_are_told_to_nobody(place: Place, events: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0, logger="loadstone")
    place.server.fault("model.safetensors", status=503)
    resolve(place.model)
    put(place, FILES | {"config.json": b"[]"})
    place.server.fault("config.json", status=403, times=99)
    with pytest.raises(SourceError) as caught:
        resolve(place.model)
    assert TOKEN not in f"{caught.value} {caught.value.__dict__} {events} {caplog.text}"


# Offline, and out of reach


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_uses_the_cached_copy_and_asks_nothing(place: Place, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="offline was asked for"):
        resolve(place.model, offline=True)
    online = resolve(place.model)
    place.server.asked.clear()
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(place.model, offline=how == "argument").weights == online.weights
    assert place.server.asked == []


def test_without_a_route_the_cached_copy_is_used_with_a_warning_and_no_waits(
    place: Place, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    online = resolve(place.model)
    with closed_port() as endpoint:
        place.move_to(endpoint, monkeypatch)
        assert resolve(place.model).weights == online.weights
    assert "no route" in named(events, "source.warning")[0].fields["message"]
    assert named(events, "source.retry") == []


def test_without_a_route_or_a_copy_the_error_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_port() as endpoint:
        place.move_to(endpoint, monkeypatch)
        with pytest.raises(SourceError, match="no route"):
            resolve(place.model, retry=ONCE)


# What is removed


def test_fetched_weights_can_be_removed_and_come_again(place: Place) -> None:
    files = resolve(place.model)
    weights = fetched_weights(files)
    assert weights is not None
    assert weights.remove() == len(SHARD)
    assert not files.weights[0].exists()
    assert resolve(place.model).weights[0].read_bytes() == SHARD
