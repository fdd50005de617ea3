"""What earlier loads took makes the next plan better, and a file that is damaged makes none worse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from loadstone.planner.accuracy import (
    ENOUGH,
    KEPT,
    MARGIN,
    NAME,
    Allowance,
    LoadRecord,
    add_record,
    allowance_of,
    read_records,
)  # fmt: skip

MB = 10**6
RECORD = LoadRecord(
    id="a", time=1.0, model="m", strategy="4bit", kind="cpu", context=512, streams=1, from_store=False, seconds=1.5,
    allowance=50 * MB, planned_load_peak=1000 * MB, planned_beside=500 * MB, load_peak=980 * MB, beside=470 * MB,
)  # fmt: skip


def records(*extra: int) -> list[LoadRecord]:
    """Loads whose unknown part took so many bytes."""
    return [
        replace(RECORD, id=str(number), load_peak=None, beside=450 * MB + bytes_) for number, bytes_ in enumerate(extra)
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    add_record(tmp_path, RECORD)
    assert read_records(tmp_path) == [RECORD]


def test_later_line_of_a_load_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    add_record(tmp_path, replace(RECORD, beside=None))
    add_record(tmp_path, RECORD)
    assert read_records(tmp_path) == [RECORD]


def test_file_keeps_the_latest_only(tmp_path: Path) -> None:
    for number in range(3 * KEPT):
        add_record(tmp_path, replace(RECORD, id=f"{number:05d}"))
    kept = read_records(tmp_path)
    assert len(kept) <= 2 * KEPT + 1
    assert kept[-1].id == f"{3 * KEPT - 1:05d}"


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    add_record(tmp_path, RECORD)
    with (tmp_path / NAME).open("ab") as out:
        out.write(b'{"half\n\xff\xfe\n[]\n{"id": 3}\n' + json.dumps({"id": "b", "x": 1}).encode() + b"\n")
    assert read_records(tmp_path) == [RECORD]


def test_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    add_record(tmp_path / "file", RECORD)
    assert read_records(tmp_path / "file") == []


def test_nothing_is_learned_from_too_few_loads() -> None:
    assert allowance_of(records(*[90 * MB] * (ENOUGH - 1)), "cpu", otherwise=7) == Allowance(7)


def test_nothing_is_learned_from_loads_of_another_kind() -> None:
    assert allowance_of(records(*[90 * MB] * 9), "cuda", otherwise=7) == Allowance(7)


def test_most_that_was_taken_and_a_margin_is_planned_for() -> None:
    found = allowance_of(records(90 * MB, 110 * MB, 100 * MB), "cpu", otherwise=7)
    assert found == Allowance(110 * MB + MARGIN, 3, (MARGIN, MARGIN + 20 * MB))


def test_loads_that_took_less_make_no_plan_smaller() -> None:
    assert allowance_of(records(*[10 * MB] * 5), "cpu", otherwise=50 * MB).bytes == 50 * MB


@given(st.lists(st.integers(0, 400 * MB), min_size=ENOUGH, max_size=12))
def test_allowance_covers_every_load_that_it_was_learned_from(extra: list[int]) -> None:
    assert allowance_of(records(*extra), "cpu", otherwise=0).bytes >= max(extra)
