"""Stretches of files: the same bytes from the page cache, from the disk, and where neither can be told apart."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.checkpoint import disk
from loadstone.checkpoint.disk import Buffer, FileReader
from loadstone.errors import CheckpointError

SIZE = 300_001


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("disk") / "file"
    place.write_bytes(random.Random(0).randbytes(SIZE))
    return place


def evict(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


WAYS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "cached": lambda file, _: file.read_bytes(),
    "cold": lambda file, _: evict(file),
    "no direct reads": lambda _, patch: patch.setattr(disk, "_DIRECT", 0),
    "refused in spite of the open": lambda _, patch: patch.setattr(FileReader, "_read_direct", lambda *_: False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files cannot be put out of memory here")
@given(start=st.integers(0, SIZE - 1), length=st.integers(1, 70_000))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_stretch_is_the_files_bytes(way: str, file: Path, start: int, length: int) -> None:
    length = min(length, SIZE - start)
    wanted = file.read_bytes()[start : start + length]
    with pytest.MonkeyPatch.context() as patch:
        WAYS[way](file, patch)
        with FileReader(file) as reader:
            assert bytes(reader.read(start, length, Buffer(70_000)).numpy()) == wanted


@pytest.mark.skipif(not disk._DIRECT, reason="no direct reads here")
def test_what_is_read_directly_does_not_come_into_the_page_cache(file: Path) -> None:
    evict(file)
    with FileReader(file) as reader:
        if reader._is_cached(0, SIZE):
            pytest.skip("this file system keeps its files in memory")
        reader.read(0, SIZE, Buffer(SIZE))
        assert not reader._is_cached(0, 4096)
        file.read_bytes()
        assert reader._is_cached(0, SIZE)


def test_a_stretch_beyond_the_end_is_an_error(file: Path) -> None:
    with FileReader(file) as reader, pytest.raises(CheckpointError, match="truncated"):
        reader.read(SIZE - 10, 20, Buffer(100))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        FileReader(tmp_path / "nowhere")
