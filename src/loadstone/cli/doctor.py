"""`loadstone doctor`: whether this machine and installation are well, and what to do where they are not."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from loadstone.errors import LoadstoneError
from loadstone.units import format_size

from .interrupts import HeldInterrupts
from .options import verbose_option
from .output import Row, heading, rows, write_json
from .progress import shown_progress

if TYPE_CHECKING:
    from loadstone.hardware import Check

    from .diagnosis import Diagnosis


@click.command(short_help="Check this machine and installation; say what to do.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")
@verbose_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Look at this machine and installation, and say what to do about each problem.

    Tells devices, memory and container limits, kernels, plug-ins, versions, free disk and settings. Exits with 0
    when models can be loaded here, with 5 when something keeps them from it.
    """
    with shown_progress("Looking at this machine"):
        with HeldInterrupts():
            from .diagnosis import diagnose

        found = diagnose()
    if as_json:
        write_json(_as_json(found))
    else:
        _show(found)
    if not found.is_usable:
        context.exit(LoadstoneError.exit_code)


def _as_json(found: Diagnosis) -> dict[str, Any]:
    checks = [asdict(check) for check in found.checks]
    problems = [asdict(check) for check in found.problems]
    return {"usable": found.is_usable, "problems": problems, "checks": checks, **found.facts}


def _show(found: Diagnosis) -> None:
    out = sys.stdout
    heading(out, "checks", is_first=True)
    rows(out, ((check.name, f"{_mark(check)}  {check.found}") for check in found.checks))
    heading(out, "devices")
    rows(out, _devices(found.facts))
    heading(out, "memory")
    rows(out, _memory(found.facts["memory"]))
    heading(out, "known, built in and from plug-ins")
    rows(out, ((kind, ", ".join(names)) for kind, names in found.facts["known"].items()))
    heading(out, "versions")
    rows(out, ((name, number or "not installed") for name, number in found.facts["versions"].items()))
    if found.problems:
        heading(out, "what to do")
        rows(out, ((check.name, f"{check.found}. {check.remedy}") for check in found.problems))
    heading(out, _verdict(found))


def _mark(check: Check) -> str:
    return "ok  " if check.ok else "FAIL" if check.required else "note"


def _devices(facts: dict[str, Any]) -> list[Row]:
    here = [
        (
            device["device"],
            f"{device['name']}, {format_size(device['free_bytes'])} free of {format_size(device['total_bytes'])}"
            + (f", {device['cores']} cores" if device["cores"] else "")
            + (f", {' '.join(device['capabilities'])}" if device["capabilities"] else "")
            + (f"; chosen: {device['reason']}" if device["chosen"] else "")
            + (f"; passed over: {device['passed_over']}" if device["passed_over"] else ""),
        )
        for device in facts["devices"]
    ]
    return [*here, *((kind, f"none: {reason}") for kind, reason in facts["absent_devices"].items())]


def _memory(memory: dict[str, Any]) -> list[Row]:
    groups = [
        ("container limit", f"{format_size(one['limit_bytes'])}, {format_size(one['used_bytes'])} used: {one['path']}")
        for one in memory["container_limits"]
    ]
    physical = f"{format_size(memory['physical_bytes'])}, {format_size(memory['available_bytes'])} available"
    return [("machine", physical), *(groups or [("container limit", "none")])]


def _verdict(found: Diagnosis) -> str:
    notes = [check for check in found.problems if not check.required]
    if not found.is_usable:
        return "Models cannot be loaded here until the above is done."
    if notes:
        return f"Models can be loaded here; {len(notes)} of the above would make it better."
    return "All is well."
