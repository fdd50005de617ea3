"""What earlier loads on this machine were planned to take, and took: kept in a small file, so that plans get better.

Weights, KV cache and buffers are counted exactly; what a process takes beside them (libraries, threads, allocators) is
not, and is what is learned here. Knows numbers and one file, no model and no device.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.hardware.device import Device, MemorySettings
from loadstone.telemetry import emit

from .plan import Plan

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec

NAME = "loads.jsonl"
KEPT = 256  # records in the file; the oldest go
RECENT = 16  # records of a kind that are learned from
ENOUGH = 3  # of them, before anything is learned
MARGIN = 24_000_000  # bytes above the most that was seen: the next load may take a little more


@dataclass(frozen=True)
class LoadRecord:
    """One load: what it was planned to take, and took, in bytes; None is what was not seen.

    `kind` is what the unknown part depends on, such as "cpu, 2 threads"; `allowance` is what was planned for it.
    `load_peak` is of making the weights; `beside` is what the process had beside weights and KV cache when it let go
    of them.
    """

    id: str
    time: float
    model: str
    strategy: str
    kind: str
    context: int
    streams: int
    from_store: bool
    seconds: float
    allowance: int
    planned_load_peak: int
    planned_beside: int
    load_peak: int | None = None
    beside: int | None = None

    @property
    def errors(self) -> list[int]:
        """By how many bytes the plan was too high, for each phase that was seen; below 0 it was too low."""
        pairs = ((self.planned_load_peak, self.load_peak), (self.planned_beside, self.beside))
        return [planned - taken for planned, taken in pairs if taken is not None]


@dataclass(frozen=True)
class Allowance:
    """What is planned for beside what is counted, in bytes, as `loads` loads taught.

    Plans of them were too high by `too_high` bytes, from the least to the most; without enough of them, it is the
    allowance of before.
    """

    bytes: int
    loads: int = 0
    too_high: tuple[int, int] = (0, 0)


def kind_of(device: Device, settings: MemorySettings) -> str:
    """Return the kind of loads on a device."""
    return f"{device.kind}, {settings.threads} threads" if settings.threads else device.torch_name


def record_of(spec: ModelSpec, plan: Plan, seconds: float, *, allowance: int, from_store: bool) -> LoadRecord:
    """Return the record of a load that took so many seconds, with what was planned for it."""
    return LoadRecord(
        id=uuid.uuid4().hex,
        time=time.time(),
        model=spec.name,
        strategy=plan.strategy,
        kind=kind_of(plan.device, plan.settings),
        context=plan.context,
        streams=plan.streams,
        from_store=from_store,
        seconds=seconds,
        allowance=allowance,
        planned_load_peak=plan.load_peak_bytes,
        planned_beside=plan.runtime_bytes + plan.activation_bytes,
    )


def allowance_of(records: Iterable[LoadRecord], kind: str, *, otherwise: int) -> Allowance:
    """Return what to plan for a load of this kind beside what is counted, from the latest records of it.

    It is never less than `otherwise`: what was too much for some loads may be just enough for the next.
    """
    recent = [one for one in records if one.kind == kind and one.errors][-RECENT:]
    if len(recent) < ENOUGH:
        return Allowance(otherwise)
    most = max(one.allowance - min(one.errors) for one in recent)
    allowance = max(otherwise, most + MARGIN)
    # By how much each would have been off with this allowance, in the phase where it was off least.
    off = [allowance - one.allowance + min(one.errors) for one in recent]
    return Allowance(allowance, len(recent), (min(off), max(off)))


def read_records(folder: Path) -> list[LoadRecord]:
    """Return the records in a folder, oldest first; those that cannot be read are left out."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, LoadRecord] = {}
    for line in lines:
        if (record := _record(line)) is not None:
            found[record.id] = record  # a later line of the same load knows more
    return list(found.values())


def add_record(folder: Path, record: LoadRecord) -> None:
    """Write a record, in place of an earlier one of the same load; what cannot be written is said and done without."""
    file = folder / NAME
    line = json.dumps(asdict(record)) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(line)  # one write at the end of the file: lines of other processes stay whole
        if file.stat().st_size > 2 * KEPT * len(line):
            _write(file, read_records(folder)[-KEPT:])
    except OSError as error:
        emit("plan.warning", reason=f"what the load took is not remembered: {error}", file=str(file))


def _write(file: Path, records: Sequence[LoadRecord]) -> None:
    """Put records in place of a file's, all or nothing."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as out:
        out.writelines(json.dumps(asdict(one)) + "\n" for one in records)
    os.replace(out.name, file)


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "time": (int, float), "model": (str,), "strategy": (str,), "kind": (str,), "context": (int,),
    "streams": (int,), "from_store": (bool,), "seconds": (int, float), "allowance": (int,),
    "planned_load_peak": (int,), "planned_beside": (int,),
}  # fmt: skip


def _record(line: str) -> LoadRecord | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    known = {one.name for one in fields(LoadRecord)}
    if not isinstance(values, dict) or not values.keys() <= known:
        return None
    wrong = any(not isinstance(values.get(name), kinds) for name, kinds in _TYPES.items())
    wrong |= any(not isinstance(values.get(name), int | None) for name in known - _TYPES.keys())
    return None if wrong else LoadRecord(**values)
