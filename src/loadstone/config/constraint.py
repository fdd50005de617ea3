"""What an answer must follow, as it was written: JSON schemas as one text, and what no grammar could be made of.

Knows JSON and how much of it is too much; which schemas can be followed is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from .json_schema import pointer, problem, schemas
from .wish import show

LARGEST_SCHEMA = 1 << 20  # characters; one of hundreds of thousands takes seconds to be made a grammar of
DEEPEST_SCHEMA = 100  # levels


def schema_text(value: Any) -> str:
    """Return a JSON schema as JSON text; it is a mapping, such a text, or a pydantic model.

    Raises ValueError for anything else, for what is no JSON, for what is too large or nested too deeply, and, with the
    place, for a keyword that is misspelled or too many properties.
    """
    if isinstance(value, type) and issubclass(value, BaseModel):
        value = closed(value.model_json_schema())
    if isinstance(value, str):
        check_size(value)
        value = _read(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"it must be a JSON schema (a mapping, its JSON text, or a pydantic model), not {show(value)}")
    _check_form(value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    check_size(text)
    if (found := problem(json.loads(text))) is not None:
        raise ValueError(f"at {pointer(found[0])}: {found[1]}")
    return text


def check_size(text: str) -> None:
    """Raise ValueError for what is too large to be made a grammar of, or has characters that no text has."""
    if len(text) > LARGEST_SCHEMA:
        raise ValueError(f"it has {len(text)} characters, more than the {LARGEST_SCHEMA} that are read")
    check_characters(text)


def check_characters(text: str) -> None:
    """Raise ValueError where a character is half of one, which no text can have."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} is a lone surrogate, which is no character") from error


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Let objects have no other properties than those named, where nothing is said: the model would drop them."""
    left: list[Any] = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if "properties" in one:
                one.setdefault("additionalProperties", False)
            left.extend(inner for _, inner in schemas(one))
    return schema


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {DEEPEST_SCHEMA} levels") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, line {error.lineno} column {error.colno}: {error.msg}") from error


def _check_form(schema: Mapping[str, Any]) -> None:
    """Raise ValueError, with the place, where a schema is nested too deeply; and where there is too much of it.

    It may have one thing in many places, or in itself, and then be far larger than the memory that it takes.
    """
    left: list[tuple[Any, tuple[str, ...]]] = [(schema, ())]
    for _ in range(LARGEST_SCHEMA):
        if not left:
            return
        value, place = left.pop()
        if len(place) > DEEPEST_SCHEMA:
            raise ValueError(f"it is nested deeper than {DEEPEST_SCHEMA} levels, below /{'/'.join(place[:5])}/…")
        if isinstance(value, Mapping):
            left.extend((inner, (*place, str(key))) for key, inner in value.items())
        elif isinstance(value, (list, tuple)):
            left.extend((inner, (*place, str(number))) for number, inner in enumerate(value))
    raise ValueError(f"it has more than {LARGEST_SCHEMA} values")


def _plain(value: Any) -> Any:
    """Return what stands for a mapping that is no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{show(value)} is no value of JSON")
