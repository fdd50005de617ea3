"""`loadstone cache`: the store of quantised weights: what is in it, whether it is whole, and how to make room."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loadstone.errors import CheckpointError, ConfigurationError, LoadstoneError
from loadstone.units import format_age, format_size, parse_age, parse_size

from .entries import SHORT, label, named, store_in_force
from .options import config_option, verbose_option
from .output import Row, heading, rows, say, table, write_json
from .progress import shown_progress

if TYPE_CHECKING:
    from pathlib import Path

    from loadstone.store import Entry, Store

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DAMAGED = CheckpointError.exit_code
IN_USE = "in use now"


@click.group(short_help="Look at the store of quantised weights, check it, make room.", invoke_without_command=True)
@verbose_option
@click.pass_context
def cache(context: click.Context) -> None:
    """Look at the store of quantised weights, check it, and make room.

    Weights are quantised once and kept there, so that a model loads at once after that. All of it can be made again.
    """
    if context.invoked_subcommand is None:
        say(context.get_help())
        context.exit(ConfigurationError.exit_code)


def _shared_options(command: Decorated) -> Decorated:
    command = verbose_option(command)
    command = click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of text.")(command)
    return config_option(command)


def _number(parse: Callable[[str], float]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
        try:
            return None if value is None else parse(value)
        except (ValueError, OverflowError) as error:
            raise click.BadParameter(str(error), context, parameter) from None

    return read


# -- ls ---------------------------------------------------------------------------------------------------------------


@cache.command("ls", short_help="List what is in the store.")
@_shared_options
def list_entries(config_file: str | None, as_json: bool) -> None:
    """List what is in the store: each model with its strategy, size, origin and last use, and what is damaged."""
    store = store_in_force(config_file)
    about = _contents(store)
    if as_json:
        write_json(about)
    else:
        _show(about)


def _contents(store: Store) -> dict[str, Any]:
    """Return all that `ls` tells; bytes, and seconds since the epoch."""
    from loadstone.store import size_of

    entries = [_about(store, entry) for entry in store.entries()]
    damaged = [*store.damaged(), *store.unreadable()]
    return {
        "folder": str(store.folder),
        "total_bytes": sum(one["bytes"] for one in entries),
        "max_size_bytes": store.max_size,
        "entries": entries,
        "damaged": [{"name": _name_of(one), "bytes": size_of(one), "folder": str(one)} for one in damaged],
    }


def _about(store: Store, entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "name": manifest.name,
        "strategy": manifest.strategy,
        "layout": manifest.layout,
        "bytes": entry.nbytes,
        "source_bytes": manifest.source_bytes,
        "origin": manifest.origin,
        "revision": manifest.revision,
        "made": manifest.made,
        "last_used": entry.last_used,
        "in_use": store.is_in_use(entry),
        "key": manifest.key,
        "folder": str(entry.folder),
    }


def _name_of(folder: Path) -> str | None:
    from loadstone.store import DamagedError, Entry

    try:
        return Entry.at(folder).manifest.name
    except (OSError, DamagedError):
        return None


def _show(about: Mapping[str, Any]) -> None:
    entries, damaged = about["entries"], about["damaged"]
    if entries:
        table(sys.stdout, ("model", "strategy", "size", "last use", "key", "origin"), map(_cells, entries))
        heading(sys.stdout, "in all")
    limit = f", of {format_size(about['max_size_bytes'])} that store.max_size allows" if about["max_size_bytes"] else ""
    rows(sys.stdout, [
        ("folder", about["folder"]),
        ("total", f"{_counted(len(entries))}, {format_size(about['total_bytes'])}{limit}"),
    ])  # fmt: skip
    if damaged:
        heading(sys.stdout, "damaged, and made again when needed (`loadstone cache prune` removes these)")
        listed = ((one["name"] or "unknown", f"{format_size(one['bytes'])}, {one['folder']}") for one in damaged)
        rows(sys.stdout, listed)


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    revision = f"@{one['revision'][:SHORT]}" if one["revision"] else ""
    used = IN_USE if one["in_use"] else format_age(time.time() - one["last_used"])
    size, key = format_size(one["bytes"]), one["key"][:SHORT]
    return one["name"], one["strategy"], size, used, key, f"{one['origin']}{revision}"


def _counted(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


# -- verify -----------------------------------------------------------------------------------------------------------


@cache.command(short_help="Read all of it and tell what is damaged.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@_shared_options
@click.pass_context
def verify(context: click.Context, names: tuple[str, ...], config_file: str | None, as_json: bool) -> None:
    """Read every byte of all entries, or of those called NAME, and compare it with what was written.

    What is damaged is set aside, and made again at the next load. Exits with 3 when something is damaged or cannot be
    read, with 0 otherwise.
    """
    store = store_in_force(config_file)
    found = [] if names else _set_unreadable_aside(store)
    with shown_progress("Checking"):
        found += [_verified(store, entry) for entry in (named(store, names) if names else store.entries())]
    if as_json:
        write_json({"ok": all(one["problem"] is None for one in found), "entries": found})
    elif found:
        rows(sys.stdout, map(_verdict, found))
    else:
        say("The store is empty.")
    if any(one["problem"] is not None for one in found):
        context.exit(DAMAGED)


def _verified(store: Store, entry: Entry) -> dict[str, Any]:
    size = entry.nbytes
    try:
        problem = store.verify(entry)
        is_set_aside = problem is not None
    except (LoadstoneError, OSError) as error:  # it cannot be read: nobody knows whether it is whole
        problem, is_set_aside = getattr(error, "message", str(error)), False
    about = {"name": entry.manifest.name, "strategy": entry.manifest.strategy, "key": entry.manifest.key}
    return {**about, "bytes": size, "problem": problem, "set_aside": is_set_aside}


def _set_unreadable_aside(store: Store) -> list[dict[str, Any]]:
    """Set aside what stands among the entries and is none."""
    from loadstone.store import size_of

    found = []
    for folder, problem in store.unreadable().items():
        about = {"name": None, "strategy": None, "key": folder.name, "bytes": size_of(folder)}
        store.set_aside(folder, problem)
        found.append({**about, "problem": problem, "set_aside": True})
    return found


def _verdict(one: Mapping[str, Any]) -> Row:
    name = f"{one['name']} in {one['strategy']}" if one["name"] else "unknown"
    text = f"ok, {format_size(one['bytes'])}"
    if one["problem"] is not None:
        told = "damaged, and set aside" if one["set_aside"] else "not known to be whole"
        text = f"{told}: {one['problem']}"
    return f"{name} ({one['key'][:SHORT]})", text


# -- prune and rm -----------------------------------------------------------------------------------------------------


@cache.command(short_help="Make room: remove what was not used for long.")
@click.option("--max-size", metavar="SIZE", callback=_number(parse_size), help="Leave at most this much, like 50GB.")
@click.option(
    "--older-than", metavar="AGE", callback=_number(parse_age), help="Remove what was not used for this long, like 30d."
)
@_shared_options
def prune(max_size: int | None, older_than: float | None, config_file: str | None, as_json: bool) -> None:
    """Remove what was not used for AGE (30d, 12h, 2w), then what was used longest ago until the rest takes SIZE.

    With neither, the limit is store.max_size. What is in use stays. What is damaged or left over goes in any case.
    """
    store = store_in_force(config_file)
    if max_size is None and older_than is None:
        max_size = store.max_size
        if max_size is None:
            say("No limit is configured (store.max_size) and none is given: no entry is removed for its size or age.")
    _set_unreadable_aside(store)
    sizes = {entry.folder: entry.nbytes for entry in store.entries()}
    swept = store.sweep()
    removed = store.prune(max_size=max_size, older_than=older_than)
    _tell(removed, sizes, swept, _held_back(store, max_size, older_than), as_json=as_json)


def _held_back(store: Store, max_size: int | None, older_than: float | None) -> list[Entry]:
    """Return what would have been removed were it not in use."""
    left = store.entries()
    is_too_much = max_size is not None and sum(entry.nbytes for entry in left) > max_size
    now = time.time()
    return [
        entry
        for entry in left
        if (is_too_much or (older_than is not None and now - entry.last_used > older_than)) and store.is_in_use(entry)
    ]


@cache.command(short_help="Remove entries by name, or all.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Remove all that is not in use, and what is damaged or left over.")
@_shared_options
def rm(names: tuple[str, ...], is_all: bool, config_file: str | None, as_json: bool) -> None:
    """Remove the entries called NAME.

    NAME is what `loadstone cache ls` shows: a model's name or the last part of it, which means all entries of that
    name, or the first digits of a key (four at least). When one of them is in use, none is removed.
    """
    if bool(names) == is_all:
        raise click.UsageError("Name what to remove, or say --all.")
    store = store_in_force(config_file)
    wanted = store.entries() if is_all else named(store, names)
    in_use = [entry for entry in wanted if store.is_in_use(entry)]
    if in_use and not is_all:
        raise _in_use(in_use)
    sizes = {entry.folder: entry.nbytes for entry in wanted}
    removed = [entry for entry in wanted if entry not in in_use and store.remove(entry)]
    in_use = [entry for entry in wanted if entry not in removed]  # also what somebody began to use meanwhile
    if is_all:
        _set_unreadable_aside(store)
    _tell(removed, sizes, store.sweep() if is_all else 0, in_use, as_json=as_json)
    if in_use and not is_all:
        raise _in_use(in_use)


def _in_use(entries: Sequence[Entry]) -> LoadstoneError:
    return LoadstoneError(
        f"{', '.join(map(label, entries))}: {IN_USE}", hint="End the processes that have it loaded, and try again."
    )


def _tell(
    removed: Sequence[Entry], sizes: Mapping[Path, int], swept: int, in_use: Sequence[Entry], *, as_json: bool
) -> None:
    """Tell what was removed, what stays because somebody uses it, and how many bytes that freed."""
    freed = swept + sum(sizes[entry.folder] for entry in removed)
    if as_json:
        about = [{**_names(entry), "bytes": sizes[entry.folder]} for entry in removed]
        write_json({"freed_bytes": freed, "left_over_bytes": swept, "removed": about, "in_use": [*map(_names, in_use)]})
        return
    told = [("removed", f"{label(entry)}, {format_size(sizes[entry.folder])}") for entry in removed]
    told += [("left over", format_size(swept))] if swept else []
    told += [("stays", f"{label(entry)}: {IN_USE}") for entry in in_use]
    rows(sys.stdout, [*told, ("freed", format_size(freed))])


def _names(entry: Entry) -> dict[str, str]:
    return {"name": entry.manifest.name, "strategy": entry.manifest.strategy, "key": entry.manifest.key}
