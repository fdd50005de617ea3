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
from .runtime import REST, Allowance

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec

NAME = "loads.jsonl"
KEPT = 256  # records in the file; the oldest go
LARGEST_FILE = 1 << 20  # bytes of it that are read, the last ones: it is small, unless somebody else wrote it
RECENT = 16  # records of a kind that are learned from: what an older version of a library took is forgotten with them
ENOUGH = 3  # of them, before anything is learned
MARGIN = 24_000_000  # bytes above the most that was seen: the next load may take a little more
FOREIGN = 500_000_000  # bytes that no library takes: something else in the process grew meanwhile


@dataclass(frozen=True)
class LoadRecord:
    """One load: what it was planned to take, and took, in bytes; None is what was not seen.

    `kind` is what the unknown part depends on, such as "cpu, 2 threads"; `allowance` is what was planned for it, and is
    in `planned_runtime`. `planned_model` is weights and KV cache. Of what was taken `load_peak` is all that the process
    had while weights were made; `beside` is the most that it had beside weights and KV cache afterwards, and `idle`
    what it still had beside them when the model was let go of and the allocator's free memory had been given back.
    `process_peak` is the most that the process ever had when the load was done.
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
    planned_model: int
    planned_runtime: int
    planned_activations: int
    process_peak: int
    load_peak: int | None = None
    beside: int | None = None
    idle: int | None = None

    @property
    def planned_beside(self) -> int:
        """What was planned for beside weights and KV cache."""
        return self.planned_runtime + self.planned_activations

    @property
    def errors(self) -> list[int]:
        """By how many bytes the plan was too high, for each phase that was seen; below 0 it was too low."""
        pairs = ((self.planned_load_peak, self.load_peak), (self.planned_beside, self.beside))
        return [planned - taken for planned, taken in pairs if taken is not None]

    @property
    def too_high(self) -> int | None:
        """By how many bytes the most at any time was planned too high, had the KV cache been full; None: not seen."""
        if self.beside is None:
            return None
        planned = max(self.planned_load_peak, self.planned_model + self.planned_beside)
        return planned - max(self.load_peak or 0, self.planned_model + self.beside)

    @property
    def rest(self) -> int | None:
        """What it took, as far as was seen, of that for which the allowance is; None where nothing was seen.

        While nobody asks that is all that came after the plan. While somebody does, or the model is loaded, it is what
        was taken beyond what is counted for that.
        """
        seen = [self.allowance - one for one in self.errors]
        if self.idle is not None:
            seen.append(self.idle - (self.planned_runtime - self.allowance))
        return max(seen, default=None)


def kind_of(device: Device, settings: MemorySettings, *, again: bool = False) -> str:
    """Return the kind of loads on a device; `again` are those of a process that has all but the model already."""
    kind = f"{device.kind}, {settings.threads} threads" if settings.threads else device.torch_name
    return f"{kind}, again" if again else kind


def record_of(
    spec: ModelSpec, plan: Plan, seconds: float, *, kind: str, from_store: bool, process_peak: int
) -> LoadRecord:
    """Return the record of a load that took so many seconds, with what was planned for it."""
    return LoadRecord(
        id=uuid.uuid4().hex,
        time=time.time(),
        model=spec.name,
        strategy=plan.strategy,
        kind=kind,
        context=plan.context,
        streams=plan.streams,
        from_store=from_store,
        seconds=seconds,
        allowance=plan.learned.bytes,
        planned_load_peak=plan.load_peak_bytes,
        planned_model=sum(plan.weight_bytes.values()) + plan.kv_bytes,
        planned_runtime=plan.runtime_bytes,
        planned_activations=plan.activation_bytes,
        process_peak=process_peak,
    )


def allowance_of(records: Iterable[LoadRecord], kind: str, *, otherwise: int = REST) -> Allowance:
    """Return what to plan for a load of this kind beside what is counted, from the latest records of it.

    That is the most that one of them took, and a margin. It is less than `otherwise` only where enough of them were
    seen to their end: what a load took before the first answer is not all.
    """
    recent = [one for one in records if one.kind == kind and one.rest is not None and one.rest < FOREIGN][-RECENT:]
    if len(recent) < ENOUGH:
        return Allowance(otherwise)
    allowance = max(one.rest for one in recent if one.rest is not None) + MARGIN
    if sum(one.idle is not None for one in recent) < ENOUGH:
        allowance = max(allowance, otherwise)
    off = [allowance - one.allowance + one.too_high for one in recent if one.too_high is not None]
    return Allowance(allowance, len(off), (min(off), max(off)) if off else (0, 0))


def read_records(folder: Path) -> list[LoadRecord]:
    """Return the records in a folder, oldest first; those that cannot be read are left out."""
    try:
        with (folder / NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LARGEST_FILE))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
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
        try:
            out.writelines(json.dumps(asdict(one)) + "\n" for one in records)
            out.close()
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise


_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,), "time": (int, float), "model": (str,), "strategy": (str,), "kind": (str,), "context": (int,),
    "streams": (int,), "from_store": (bool,), "seconds": (int, float), "allowance": (int,),
    "planned_load_peak": (int,), "planned_model": (int,), "planned_runtime": (int,), "planned_activations": (int,),
    "process_peak": (int,),
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
