"""`benchmarks.memory`: which loads there are, and when a promise counts as kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import memory
from benchmarks.checkpoints import Shape, write_checkpoint
from benchmarks.memory_cases import GRID, Case, cases_of
from benchmarks.memory_report import error, is_kept, table_of

from loadstone.checkpoint import inspect
from loadstone.sources import resolve

MB = 10**6
SIZES = (128, 2, 4, 2, 192, 300, True)


def found(peak: int, planned: int) -> dict[str, Any]:
    sizes = {"settled_peak_bytes": peak, "full_rss_bytes": peak, "peak_bytes": peak}
    return {**sizes, "predicted": {"load_peak": planned, "steady": planned // 2}}


def test_there_are_loads_enough_of_every_architecture() -> None:
    cases = [case for model in GRID for case in cases_of(model)]
    assert len(cases) >= 24
    assert len(set(cases)) == len(cases)
    assert {case.strategy for case in cases} == {"4bit", "8bit", "none"}


@pytest.mark.parametrize(
    ("peak", "planned", "kept"),
    [
        (1000, 1000, True), (1000, 999, False), (1000, 1157, True), (1000, 1158, False),
        (10_000, 10_300, True), (10_000, 10_301, False),
    ],
)  # fmt: skip
def test_a_promise_is_kept_between_too_little_and_too_much(peak: int, planned: int, kept: bool) -> None:
    assert is_kept(found(peak * MB, planned * MB)) is kept
    assert error(found(peak * MB, planned * MB)) == (planned - peak) * MB


def test_table_says_how_many_were_kept() -> None:
    case = Case("m", "4bit", 512, 1, True)
    table = table_of([(case, found(1000 * MB, 1010 * MB)), (case, found(1000 * MB, 900 * MB))])
    assert "1 of 2" in str(table.title)
    assert table.row_count == 2


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
def test_checkpoints_of_every_architecture_are_read(tmp_path: Path, model_type: str) -> None:
    window = 64 if model_type == "mistral" else None
    shape = Shape(*SIZES, model_type=model_type, head_dim=64, sliding_window=window)
    write_checkpoint(shape, tmp_path)
    spec = inspect(resolve(str(tmp_path)))
    assert (spec.architecture.name, spec.head_size) == (model_type, 64)
    assert {name: one.shape for name, one in spec.tensors.items()} == dict(shape.tensors())


def test_a_load_is_measured_in_a_process_of_its_own(tmp_path: Path, small_model: Path) -> None:
    case = Case("small-model", "4bit", 256, 2, True)
    measured = memory.measure_case(case, str(small_model), tmp_path / "home", None)
    assert measured["read_tokens"] > 2 * 128
    assert measured["peak_bytes"] >= measured["full_rss_bytes"] > measured["before_rss_bytes"]
    assert json.dumps(measured)
