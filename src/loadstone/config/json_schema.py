"""Where a JSON schema has its schemas, and what is wrong with it at the first look.

Knows keywords and where they may be, not what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")  # of schemas, by name
LISTS = ("prefixItems", "anyOf", "allOf", "oneOf")
SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else")
OTHERS = (
    "type", "enum", "const", "required", "pattern", "format", "minLength", "maxLength", "minimum", "maximum",
    "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minContains",
    "maxContains", "minProperties", "maxProperties", "dependentRequired", "unevaluatedItems", "unevaluatedProperties",
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
)  # fmt: skip
KEYWORDS = dict.fromkeys((*MAPS, *LISTS, *SINGLE, *OTHERS))
ALIKE = 0.8  # how much of a word a misspelled one has
MOST_NOTES = 1000  # words that are looked at
MOST_PROPERTIES = 1000  # of one object: a grammar of ten times as many would take a hundred times as long

Path = tuple[str, ...]


def schemas(schema: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of each schema in a schema, in the order in which they are written."""
    for key, value in schema.items():
        if key in MAPS and isinstance(value, Mapping):
            yield from (((key, str(name)), one) for name, one in value.items())
        elif key in LISTS and isinstance(value, list):
            yield from (((key, str(number)), one) for number, one in enumerate(value))
        elif key in SINGLE:
            yield (key,), value


def problem(schema: Mapping[str, Any]) -> tuple[Path, str] | None:
    """Return the place of a word that is probably a keyword misspelled, or of too many properties; and what is wrong.

    Words that are like no keyword may be anybody's notes, and say nothing, as JSON schema has it.
    """
    left: list[tuple[Path, Mapping[str, Any]]] = [((), schema)]
    notes: set[str] = set()
    while left:
        path, one = left.pop()
        named = one.get("properties")
        if isinstance(named, Mapping) and len(named) > MOST_PROPERTIES:
            return (*path, "properties"), f"an object of {len(named)} properties, more than {MOST_PROPERTIES}"
        for word in () if len(notes) > MOST_NOTES else one:
            if word in KEYWORDS or word in notes or word.startswith(("$", "x-")):
                continue
            if meant := get_close_matches(word, KEYWORDS, n=1, cutoff=ALIKE):
                return (*path, word), f"{word!r} is no keyword; did you mean {meant[0]!r}?"
            notes.add(word)
        left.extend(((*path, *step), inner) for step, inner in schemas(one) if isinstance(inner, Mapping))
    return None


def pointer(path: Path) -> str:
    """Return a place as a JSON pointer (RFC 6901)."""
    return "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)
