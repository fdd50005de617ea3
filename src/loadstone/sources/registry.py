"""The sources by name; plug-ins come in through the entry point group `loadstone.sources`."""

from __future__ import annotations

import re
from typing import Any

from loadstone.plugins import Door, made

from .source import Source


def _source(name: str, found: Any) -> Source:
    if not re.fullmatch(r"[a-z][a-z0-9]+", name):
        raise TypeError(f"{name!r} cannot stand before a colon: two or more lower-case letters and digits can")
    return made(found, Source, name)  # type: ignore[type-abstract]  # asked of, not made


SOURCES: Door[Source] = Door(
    "loadstone.sources",
    {
        "bundled": "loadstone.sources.bundled:Bundled",
        "local": "loadstone.sources.local:Local",
        "hub": "loadstone.sources.hub:Hub",
        "modelscope": "loadstone.sources.modelscope:ModelScope",
        "https": "loadstone.sources.web:Https",
        "http": "loadstone.sources.web:Http",
        "s3": "loadstone.sources._fsspec:S3",
    },
    _source,
)


def register_source(source: Source) -> None:
    """Make a source known under its name; the last registration of a name wins."""
    SOURCES.register(source.name, source)
