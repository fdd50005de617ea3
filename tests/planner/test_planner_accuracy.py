"""What earlier loads took makes the next plan better, and a file that is damaged makes none worse."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_shapes import CPU_SETTINGS, GB, cpu, tiny

from loadstone.config import LoadConfig
from loadstone.planner import Plan, accuracy, plan
from loadstone.planner.accuracy import (
    ENOUGH,
    FOREIGN,
    KEPT,
    LARGEST_FILE,
    MARGIN,
    NAME,
    RECENT,
    LoadRecord,
    add_record,
    allowance_of,
    kind_of,
    read_records,
)  # fmt: skip
from loadstone.planner.runtime import Allowance
from loadstone.units import format_spread

MB = 10**6
# Of a process of 350 MB; of what was planned 20 MB were not needed to load, and 30 MB not to answer.
RECORD = LoadRecord(
    id="a", time=1.0, model="m", strategy="4bit", kind="cpu", context=512, streams=1, from_store=False, seconds=1.5,
    allowance=50 * MB, planned_load_peak=1000 * MB, planned_model=600 * MB, planned_runtime=400 * MB,
    planned_activations=100 * MB, process_peak=900 * MB, load_peak=980 * MB, beside=470 * MB, idle=360 * MB,
)  # fmt: skip


def records(*extra: int) -> list[LoadRecord]:
    """Loads whose unknown part took so many bytes, as was seen when nobody asked any more."""
    return [
        replace(RECORD, id=str(number), load_peak=None, beside=350 * MB + bytes_, idle=350 * MB + bytes_)
        for number, bytes_ in enumerate(extra)
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
    assert (found.bytes, found.loads) == (110 * MB + MARGIN, 3)


def test_loads_that_took_less_make_plans_smaller() -> None:
    assert allowance_of(records(*[10 * MB] * 5), "cpu", otherwise=50 * MB).bytes == 10 * MB + MARGIN


def test_loads_that_were_not_seen_to_their_end_make_plans_only_larger() -> None:
    """A process that ends without an unload has told what its load took, but not its answers."""
    for taken, planned in ((-30 * MB, 50 * MB), (40 * MB, 40 * MB + MARGIN)):
        unfinished = replace(RECORD, load_peak=950 * MB + taken, beside=None, idle=None)
        assert allowance_of([unfinished] * 5, "cpu", otherwise=50 * MB).bytes == planned


def test_each_phase_counts_as_what_it_took_beyond_what_is_counted_for_it() -> None:
    assert RECORD.rest == 30 * MB  # to load
    assert replace(RECORD, load_peak=None).rest == 20 * MB  # to answer
    assert replace(RECORD, load_peak=None, beside=None).rest == 10 * MB  # at the end
    assert replace(RECORD, load_peak=None, beside=None, idle=None).rest is None


def test_old_loads_are_forgotten() -> None:
    """What took much once counts no more after enough others."""
    found = allowance_of(records(300 * MB, *[10 * MB] * RECENT), "cpu")
    assert found.bytes == 10 * MB + MARGIN


def test_what_no_library_takes_is_not_learned() -> None:
    """A program may have filled memory of its own meanwhile."""
    assert allowance_of(records(*[10 * MB] * 3, 2 * FOREIGN), "cpu").bytes == 10 * MB + MARGIN


def test_loads_of_a_process_that_has_loaded_before_are_another_kind() -> None:
    device = cpu(8 * GB)
    assert kind_of(device, CPU_SETTINGS) == "cpu, 2 threads"
    assert kind_of(device, CPU_SETTINGS, again=True) == "cpu, 2 threads, again"


@given(st.lists(st.integers(0, 400 * MB), min_size=ENOUGH, max_size=RECENT))
def test_allowance_covers_every_load_that_it_was_learned_from(extra: list[int]) -> None:
    found = allowance_of(records(*extra), "cpu", otherwise=0)
    assert found.bytes >= max(extra) + MARGIN
    least, most = found.too_high
    assert MARGIN <= least <= most


def test_a_plan_tells_between_what_it_will_be_and_from_how_many_loads() -> None:
    learned = allowance_of(records(90 * MB, 110 * MB, 100 * MB), "cpu")

    def planned(learned: Allowance) -> Plan:
        runtime = 400 * MB + learned.bytes
        return plan(LoadConfig(), tiny(), cpu(8 * GB), CPU_SETTINGS, runtime_bytes=runtime, learned=learned)

    found = planned(learned)
    assert found.likely_bytes is not None
    low, high = found.likely_bytes
    assert low < high <= found.needed_bytes - MARGIN
    assert high - low == 20 * MB
    assert found.likely == f"{format_spread(low, high)}, from 3 loads"
    none = planned(Allowance())
    assert none.likely_bytes is None
    assert none.likely.startswith("at most")


def test_a_large_file_is_read_from_near_its_end(tmp_path: Path) -> None:
    """Whoever wrote it: no load waits for it."""
    (tmp_path / NAME).write_bytes(b"x" * 3 * LARGEST_FILE + b"\n")
    with (tmp_path / NAME).open("a") as out:
        out.write(json.dumps(asdict(RECORD)) + "\n")
    assert read_records(tmp_path) == [RECORD]
    add_record(tmp_path, replace(RECORD, id="b"))  # which puts what is known in the file's place
    assert len(read_records(tmp_path)) == 2
    assert (tmp_path / NAME).stat().st_size < 10_000


def test_what_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise PermissionError("not now")

    (tmp_path / NAME).write_bytes(b"x" * LARGEST_FILE)
    monkeypatch.setattr(accuracy.os, "replace", fails)
    add_record(tmp_path, RECORD)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
