"""Compiled kernels on disk: made once, made again when damaged, and done without where nothing can be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadstone.quantization.kernels.object_cache import cached_object


class Compiler:
    """Counts how often it was asked."""

    asked = 0

    def __call__(self) -> bytes:
        self.asked += 1
        return b"machine code"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOADSTONE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_code_is_made_once(home: Path) -> None:
    compiler = Compiler()
    assert [cached_object("one", ["v1"], compiler) for _ in range(3)] == [b"machine code"] * 3
    assert compiler.asked == 1


def test_another_compiler_or_processor_makes_its_own(home: Path) -> None:
    compiler = Compiler()
    cached_object("one", ["v1", "zen"], compiler)
    cached_object("one", ["v2", "zen"], compiler)
    cached_object("one", ["v1", "core"], compiler)
    assert compiler.asked == 3


@pytest.mark.parametrize("damage", [b"", b"\0", b"\0" * 100])
def test_a_damaged_file_is_made_again(home: Path, damage: bytes) -> None:
    compiler = Compiler()
    cached_object("one", ["v1"], compiler)
    (file,) = home.rglob("*.o")
    file.write_bytes(damage)
    assert cached_object("one", ["v1"], compiler) == b"machine code"
    assert compiler.asked == 2
    assert cached_object("one", ["v1"], compiler) == b"machine code"
    assert compiler.asked == 2


def test_a_flipped_bit_is_found(home: Path) -> None:
    compiler = Compiler()
    cached_object("one", ["v1"], compiler)
    (file,) = home.rglob("*.o")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cached_object("one", ["v1"], compiler) == b"machine code"


def test_nothing_is_left_beside_the_file(home: Path) -> None:
    cached_object("one", ["v1"], Compiler())
    assert [file.suffix for file in home.rglob("*") if file.is_file()] == [".o"]


def test_where_nothing_can_be_written_code_is_made_each_time(home: Path) -> None:
    home.write_text("a file where a folder should be")
    compiler = Compiler()
    assert cached_object("one", ["v1"], compiler) == b"machine code"
    assert cached_object("one", ["v1"], compiler) == b"machine code"
    assert compiler.asked == 2
