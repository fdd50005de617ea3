"""The store as a person means it: which one is in force, and which of its entries a name stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from loadstone.errors import ConfigurationError

if TYPE_CHECKING:
    from loadstone.store import Entry, Store

SHORT = 8  # digits of a key that are shown
FEWEST = 4  # digits that may stand for a key


def store_in_force(config_file: str | None) -> Store:
    """Return the store that the configuration names; raise ConfigurationError where it is switched off."""
    from loadstone.config import ConfigManager
    from loadstone.store import open_store

    configured = ConfigManager(config_file)
    store = open_store(configured.config.store)
    if store is None:
        raise ConfigurationError(
            f"The store is switched off: {configured.origin('store.enabled')} sets store.enabled to false",
            key="store.enabled",
            hint="Set store.enabled to true, or LOADSTONE_STORE__ENABLED=true for one command.",
        )
    return store


def short_key(entry: Entry) -> str:
    """Return the first digits of an entry's key."""
    return entry.manifest.key[:SHORT]


def label(entry: Entry) -> str:
    """Return what tells an entry from others: "smollm2 in 4bit (1a077ddd)"."""
    return f"{entry.manifest.name} in {entry.manifest.strategy} ({short_key(entry)})"


def named(store: Store, names: Iterable[str]) -> list[Entry]:
    """Return the entries that `names` stand for, each once; raise ConfigurationError for a name that stands for none.

    A name is a key or the first digits of one, or the name of a model, or the last part of that; all entries of a
    model are meant by its name.
    """
    entries = store.entries()
    found = {entry.folder: entry for name in names for entry in _named(entries, name)}
    return list(found.values())


def _named(entries: Sequence[Entry], name: str) -> list[Entry]:
    for is_meant in (_has_key, _has_name, _has_last_part):
        if meant := [entry for entry in entries if is_meant(entry, name)]:
            return meant
    meant = [entry for entry in entries if len(name) >= FEWEST and entry.manifest.key.startswith(name.lower())]
    if len(meant) > 1:
        raise ConfigurationError(
            f"{name!r} is the start of {len(meant)} keys", hint="\n".join(map(_with_whole_key, meant))
        )
    if not meant:
        raise ConfigurationError(f"Nothing in the store is called {name!r}", hint=_nearest(entries, name))
    return meant


def _has_key(entry: Entry, name: str) -> bool:
    return entry.manifest.key == name.lower()


def _has_name(entry: Entry, name: str) -> bool:
    return entry.manifest.name == name


def _has_last_part(entry: Entry, name: str) -> bool:
    return _last_part(entry) == name


def _last_part(entry: Entry) -> str:
    return entry.manifest.name.rpartition("/")[2]


def _with_whole_key(entry: Entry) -> str:
    return f"{entry.manifest.key}  {entry.manifest.name} in {entry.manifest.strategy}"


def _nearest(entries: Sequence[Entry], name: str) -> str:
    if not entries:
        return "The store is empty."
    known = {entry.manifest.name: entry for entry in entries}
    ways = {way: one for one, entry in known.items() for way in (one.lower(), _last_part(entry).lower())}
    ways |= {short_key(entry): short_key(entry) for entry in entries}
    near = list(dict.fromkeys(ways[way] for way in get_close_matches(name.lower(), ways, n=3, cutoff=0.5)))
    if near:
        return f"Did you mean {' or '.join(near)}?"
    some = sorted(known)[:5]
    return f"There {'is' if len(known) == 1 else 'are'} {', '.join(some)}{' …' if len(known) > len(some) else ''}"
