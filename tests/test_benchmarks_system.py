"""What the benchmarks look through: the page cache, the disk, /proc, and processes of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
from benchmarks import process_memory
from benchmarks.disk import BUFFER_BYTES, direct_read_rate
from benchmarks.page_cache import EVICTED_SHARE, ResidentWatch, evict, resident_share, warm
from benchmarks.processes import ModuleFailed, check_imports, run_module, run_watched

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page cache is looked at on Linux")


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """A file of several windows on a disk; where the tests' folder is in memory, nothing can be evicted."""
    kinds = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    if kinds[next(str(folder) for folder in tmp_path.parents if str(folder) in kinds)] in ("tmpfs", "ramfs"):
        pytest.skip("the tests' folder is in memory")
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * 40 + b"end")
    return file


def test_a_file_is_warm_after_reading_and_cold_after_evicting(large_file: Path) -> None:
    assert warm([large_file]) == resident_share([large_file]) == 1.0
    assert evict([large_file]) <= EVICTED_SHARE


def test_the_watch_sees_a_file_come_in(large_file: Path) -> None:
    evict([large_file])
    watch = ResidentWatch([large_file], limit_s=60)
    watch.start()
    warm([large_file])
    assert watch.whole_at() is not None


def test_the_watch_gives_up_at_its_limit(large_file: Path) -> None:
    evict([large_file])
    watch = ResidentWatch([large_file], limit_s=0)
    watch.start()
    assert watch.whole_at() is None


def test_no_files_are_neither_resident_nor_whole() -> None:
    watch = ResidentWatch([], limit_s=1)
    watch.start()
    assert watch.whole_at() is None
    assert resident_share([]) == 0.0


def test_the_disks_rate_is_unknown_for_a_file_smaller_than_a_buffer(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(bytes(BUFFER_BYTES - 1))
    assert direct_read_rate(file) is None


def test_memory_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("Name:\tpython\nVmHWM:\t 30 kB\nVmRSS:\t 20 kB\nRssAnon:\t 8 kB\n")
    (tmp_path / "self" / "smaps_rollup").write_text(
        "0-1 ---p 0 00:00 0 [rollup]\nPrivate_Clean: 4 kB\nPrivate_Dirty: 6 kB\nAnonymous: 7 kB\n"
    )
    assert process_memory.anonymous_bytes(proc=tmp_path) == 8 * 1024
    assert process_memory.memory_now(proc=tmp_path) == {
        "peak_rss_bytes": 30 * 1024,
        "rss_bytes": 20 * 1024,
        "private_bytes": 10 * 1024,
        "anonymous_bytes": 7 * 1024,
    }


def test_memory_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    assert set(process_memory.memory_now(proc=tmp_path).values()) == {None}


def write_module(folder: Path, code: str) -> dict[str, str]:
    """Write a module called probe; return the environment in which it is found."""
    (folder / "probe.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_process_is_timed_on_the_clock_that_it_sees_itself(tmp_path: Path) -> None:
    code = "import json, time\nkept = bytearray(b'1' * 50_000_000)\nprint('noise')\nat = time.monotonic()\n"
    environment = write_module(tmp_path, f"{code}time.sleep(0.2)\nprint(json.dumps({{'at': at}}))")
    run = run_watched("probe", environment=environment)
    assert run.spawned < run.found["at"] < run.ended
    assert run.peak_anonymous_bytes is not None
    assert run.peak_anonymous_bytes > 50_000_000


@pytest.mark.parametrize(("code", "words"), [("raise OSError('no room')", "no room"), ("print('hello')", "no JSON")])
def test_a_process_that_fails_or_tells_nothing_is_an_error_with_its_words(
    code: str, words: str, tmp_path: Path
) -> None:  # fmt: skip
    with pytest.raises(ModuleFailed, match=words):
        run_module("probe", environment=write_module(tmp_path, code))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleFailed, match="no_such_package"):
        check_imports("import no_such_package")
