"""Fake places to fetch from, empty caches, and no waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FILES, TOKEN, FakeHub, FakeModelScope
from tests.sources.fake_server import FakeFolder, FakeS3, Place, sums

from loadstone import retry


@pytest.fixture(scope="session")
def _direct_session() -> Iterator[None]:
    """A session of the Hub's library that goes to loopback directly, whatever proxies are set."""
    import huggingface_hub

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # one is kept, and it reads the proxies when it is made
        yield
    huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _direct_session: None) -> Iterator[Path]:
    """An empty cache of the Hub and one of our own, a token, and an environment that says nothing else."""
    import huggingface_hub.constants

    for name in os.environ:
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "MODELSCOPE_", "AWS_", "FSSPEC_")):
            monkeypatch.delenv(name)
    # The library reads this one when it is imported, which may have been under another environment.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path / "own"))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    retry.set_testing(True)
    yield tmp_path / "hub"
    retry.set_testing(False)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(FILES) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def modelscope(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelScope]:
    with FakeModelScope(FILES) as running:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.endpoint)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        yield running


@pytest.fixture
def folder(cache: Path) -> Iterator[FakeFolder]:
    with FakeFolder(FILES) as running:
        yield running


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[FakeS3]:
    """One for all tests, since making a client for another address takes S3's library half a second."""
    with FakeS3(FILES) as running:
        yield running


@pytest.fixture
def s3(_s3_server: FakeS3, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    """A store as it was at first; S3's own settings lead to it, with keys that are made up."""
    _s3_server.begin_anew(FILES | {"SHA256SUMS": sums(FILES)})
    for name, value in {
        "AWS_ENDPOINT_URL": _s3_server.endpoint, "AWS_ACCESS_KEY_ID": "AKIAMADEUP", "AWS_SECRET_ACCESS_KEY": TOKEN,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(params=["hub", "modelscope", "folder", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each kind of place that files are fetched from, with the same files."""
    server = request.getfixturevalue(request.param)
    return {
        "hub": lambda: Place(server, "org/model", "HF_ENDPOINT"),
        "modelscope": lambda: Place(server, "modelscope:org/model", "MODELSCOPE_ENDPOINT"),
        "folder": lambda: Place(server, server.url, None),
        "s3": lambda: Place(server, server.url, "AWS_ENDPOINT_URL"),
    }[request.param]()
