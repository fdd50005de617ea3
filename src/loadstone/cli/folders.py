"""Whether a folder that Loadstone writes to can be used: tried, not guessed, and nothing is left behind."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.hardware import Check
from loadstone.units import format_size

if TYPE_CHECKING:
    from loadstone.store import Store


def check_folder(name: str, folder: Path, knob: str, wanted: int, facts: list[dict[str, Any]]) -> Check:
    """Judge a folder that the setting `knob` moves and that should have `wanted` bytes free; add to `facts`."""
    from loadstone.sources.cache import free_bytes

    fact: dict[str, Any] = {"for": name, "folder": str(folder), "free_bytes": None, "writable": False}
    facts.append(fact)
    try:
        fact["free_bytes"] = free = free_bytes(folder)
        try_folder(folder)
    except OSError as error:
        remedy = f"Set {knob} to a folder that can be made and written, or change what is in the way."
        reason = error.strerror or str(error)
        place = f" ({error.filename})" if error.filename and str(error.filename) != str(folder) else ""
        return Check(name, False, f"{folder} cannot be made or written: {reason}{place}", remedy, required=False)
    fact["writable"] = True
    text = f"{format_size(free)} free at {folder}"
    if free < wanted:
        remedy = f"The default model's download takes 15.2 GB: free some space, or set {knob} to another disk."
        return Check(name, False, text, remedy, required=False)
    return Check(name, True, text)


def check_store(store: Store | None, switch: str) -> tuple[Check, dict[str, Any]]:
    """Judge the store of quantised weights, which the setting at `switch` may switch off; return its facts too."""
    if store is None:
        return Check("store", True, f"switched off by {switch}: every load quantises again"), {"enabled": False}
    sizes = [entry.nbytes for entry in store.entries()]
    facts: dict[str, Any] = {
        "enabled": True, "folder": str(store.folder), "writable": False, "entries": len(sizes),
        "total_bytes": sum(sizes), "max_size_bytes": store.max_size,
    }  # fmt: skip
    limit = f" of at most {format_size(store.max_size)}" if store.max_size else ""
    entries = f"{len(sizes)} {'entry' if len(sizes) == 1 else 'entries'}"
    text = f"{entries}, {format_size(sum(sizes))}{limit} at {store.folder}"
    try:
        for folder in (store.folder / "locks", store.folder / "drafts", store.folder / "entries"):
            try_folder(folder)
    except OSError as error:
        remedy = "Set store.folder (LOADSTONE_STORE__FOLDER) to a folder that can be written: without one, every load "
        remedy += "quantises again, apart from what is there already."
        return Check("store", False, f"{text}; it cannot be written: {error}", remedy, required=False), facts
    facts["writable"] = True
    return Check("store", True, text), facts


def try_folder(folder: Path) -> None:
    """Make `folder` and a file in it, then take away what was not there before; raise OSError where that fails."""
    made: list[Path] = []
    try:
        for one in (*reversed(folder.parents), folder):
            if not one.exists():
                one.mkdir()
                made.append(one)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for one in reversed(made):
            with suppress(OSError):  # another process put something there meanwhile
                one.rmdir()
