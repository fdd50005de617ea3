"""A fake Hub, an empty cache, and no waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FILES, TOKEN, FakeHub

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
    """An empty cache of the Hub, a token, and an environment that says nothing else."""
    import huggingface_hub.constants

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # The library reads this one when it is imported, which may have been under another environment.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    retry.set_testing(True)
    yield tmp_path / "hub"
    retry.set_testing(False)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(FILES) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running
