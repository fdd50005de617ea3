"""Finds where in a JSON schema lies what the whole schema is refused for.

Asks again and again about parts of the schema, until none that is smaller is refused for the same reason. Knows JSON
schemas, and not who refuses them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loadstone.config.json_schema import Path, schemas

DEFINITIONS = ("$defs", "definitions")
MOST_ASKED = 1 << 22  # characters of schemas, in all

Says = Callable[[str], str | None]


def place_of(reason: str, schema: Mapping[str, Any], says: Says) -> Path:
    """Return the way to what makes `says` refuse a schema for this reason, the smallest part that it can be laid to.

    `says` takes the text of a schema and returns why it is refused, or None.
    """
    kept = {key: schema[key] for key in DEFINITIONS if key in schema}
    asked = 0

    def is_it(part: Mapping[str, Any]) -> bool:
        nonlocal asked
        text = json.dumps({**kept, **part}, ensure_ascii=False)
        asked += len(text)
        return asked < MOST_ASKED and says(text) == reason

    path: Path = ()
    part = schema
    been: set[Path] = {path}
    while True:
        inner = (((*path, *step), one) for step, one in schemas(part))
        for place, one in (*_referred(part, schema), *inner):
            if place not in been and isinstance(one, Mapping) and is_it(one):
                path, part = place, one
                been.add(place)
                break
        else:
            break
    words = sorted((word for word in part if word not in DEFINITIONS), key=lambda word: word == "type")
    guilty = [word for word in words if not is_it({key: value for key, value in part.items() if key != word})]
    return (*path, guilty[0]) if guilty and asked < MOST_ASKED else path


def _referred(part: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the place and the value that a part refers to, where that is in the schema."""
    reference = part.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return
    path = tuple(step.replace("~1", "/").replace("~0", "~") for step in reference[2:].split("/"))
    value: Any = schema
    for step in path:
        if not isinstance(value, Mapping) or step not in value:
            return
        value = value[step]
    yield path, value
