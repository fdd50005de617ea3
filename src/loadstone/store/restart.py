"""Entries that were written before the system was last started: read once, because a crash may have come between.

An entry's bytes were on the disk before it had a name; this is for disks that say so and lie.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from loadstone.telemetry import timed

from .entry import Entry

CHECKED = "checked"  # a file in an entry that was read after a restart and found whole


def boot_id() -> str:
    """Return what is different after each start of the system, or nothing where no such thing is known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def verify_after_restart(entry: Entry) -> None:
    """Read all of an entry when the system was started anew since it was written, and nobody has done so yet.

    What nobody can write was not written by a process that a crash could have ended. Raises DamagedError.
    """
    checked = entry.folder / CHECKED
    if entry.manifest.boot == boot_id() or checked.exists() or not os.access(entry.folder, os.W_OK):
        return
    with timed("store.verify", model=entry.manifest.name, reason="first use since the system was started"):
        entry.verify()
    with suppress(OSError):
        checked.touch()
