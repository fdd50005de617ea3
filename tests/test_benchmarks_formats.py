"""`benchmarks.formats`: every format that is read is written, held against its reference, and timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import formats, measure_formats
from benchmarks.checkpoints import Shape, write_checkpoint
from safetensors.torch import load_file, save_file
from tests.quantized_checkpoints import FORMATS

from loadstone.checkpoint.quantized.registry import METHODS

TINY = Shape(256, 1, 4, 2, 384, 300, False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "plain"
    write_checkpoint(TINY, folder, tokenizer=folder.parent)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SHAPE", TINY)
    monkeypatch.setattr(measure_formats, "STEPS", 2)


def figures(made: Path) -> dict[str, object]:
    threads = torch.get_num_threads()
    task = {"model": str(made), "reference": str(made / "reference" / formats.REFERENCE), "threads": threads}
    return measure_formats.measure(task)


def test_every_method_that_is_read_is_measured() -> None:
    assert {form().config["quant_method"] for form in FORMATS.values()} == METHODS.keys()
    assert set(FORMATS) < set(formats.formats())


@pytest.mark.parametrize(
    ("name", "strategy", "most"),
    [("bfloat16", "4bit", 0.12), ("AWQ", "int4", 1e-6), ("FP8, one scale", "8bit", 0.01), ("GGUF Q8_0", "8bit", 0.01)],
)
def test_a_format_is_held_against_its_own_numbers(
    name: str, strategy: str, most: float, plain: Path, tmp_path: Path
) -> None:
    formats.formats()[name](plain, tmp_path / "model")
    found = figures(tmp_path / "model")
    assert found["strategy"] == strategy
    assert found["error"] <= most
    assert found["decode_tokens_per_s"] > 0
    assert found["file_bytes"] > 0


def test_another_reference_would_be_seen(plain: Path, tmp_path: Path) -> None:
    formats.formats()["AWQ"](plain, tmp_path / "model")
    reference = tmp_path / "model" / "reference" / formats.REFERENCE
    numbers = load_file(reference)
    save_file({name: one * 1.01 for name, one in numbers.items()}, reference)
    assert figures(tmp_path / "model")["error"] == pytest.approx(0.01, rel=0.1)


def test_the_table_has_a_row_for_each_format_and_the_last_line_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured = {
        "strategy": "int4", "quantized": "AWQ", "file_bytes": 10, "weight_bytes": 9, "load_s": 0.5, "error": 0.0,
        "decode_tokens_per_s": 7.0,
    }  # fmt: skip
    monkeypatch.setattr(formats, "run_module", lambda module, *_: {"cores": 1} if "machine" in module else measured)
    assert formats.main(["--only", "AWQ, groups", "--repetitions", "2", "--folder", str(tmp_path / "build")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("AWQ, groups of" in line for line in lines[:-1]) == 2
    found = json.loads(lines[-1])
    assert [one["format"] for one in found["formats"]] == ["AWQ, groups of 64", "AWQ, groups of 32"]
    assert not (tmp_path / "build").exists()


def test_a_name_that_no_format_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        formats.parse(["--only", "nothing like it"])
    assert "no format has 'nothing like it'" in capsys.readouterr().err
