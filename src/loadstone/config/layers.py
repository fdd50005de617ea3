"""Where settings come from, one layer each: a file, the environment, a mapping.

A layer maps a dotted key ("model_config.device") to what was said there and where. Knows which keys exist,
not which values are right: that is the schema's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from loadstone.errors import ConfigurationError
from loadstone.folders import config_folder

from .schema import SECTIONS, known_keys
from .wish import nearest, show, unknown_key

PREFIX = "LOADSTONE_"
FOUND_BY_NAME = (Path("config/config.yaml"), Path("loadstone.yaml"))


@dataclass(frozen=True)
class Entry:
    """One value as it was written, and where: `origin` for people, `file` and `line` where it was a file."""

    value: Any
    origin: str
    file: Path | None = None
    line: int | None = None


Layer = Mapping[str, Entry]


def find_file(environ: Mapping[str, str]) -> Path | None:
    """Return the file that LOADSTONE_CONFIG names, or the first in the usual places, or None.

    The places are config/config.yaml and loadstone.yaml in the working directory, then config.yaml in
    LOADSTONE_HOME or, without it, the user's config folder. Raises ConfigurationError when LOADSTONE_CONFIG
    names no file.
    """
    named = environ.get("LOADSTONE_CONFIG")
    if named:
        path = Path(os.path.expanduser(named))
        if not os.path.lexists(path):
            raise ConfigurationError(
                f"LOADSTONE_CONFIG names {path}, which does not exist",
                file=path,
                hint="Set it to a file that exists, or unset it.",
            )
        return path
    places = (*FOUND_BY_NAME, config_folder(environ) / "config.yaml")
    return next((path for path in places if os.path.lexists(path)), None)


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """Return what the LOADSTONE_SECTION__KEY variables say; empty ones say nothing.

    Raises ConfigurationError, naming the variable, for one that has the form of a setting and is none.
    """
    variables = {_variable(key): key for key in known_keys()}
    layer = {}
    for name, raw in sorted(environ.items()):
        if not name.startswith(PREFIX):
            continue
        key = variables.get(name)
        if key is None:
            _refuse_near_miss(name, list(variables))
        elif raw:
            layer[key] = Entry(_from_environment(key, raw), name)
    return layer


def mapping_layer(mapping: Mapping[Any, Any], origin: str = "argument", *, dotted: bool = False) -> Layer:
    """Return what `mapping`, in the file's shape, says; with `dotted`, "model_config.device" is a key too.

    A section may be a mapping, None (says nothing) or the wish itself, whose set fields count.
    """
    layer: dict[str, Entry] = {}
    for name, value in mapping.items():
        if dotted and isinstance(name, str) and "." in name:
            check_key(name)
            layer[name] = Entry(value, origin)
            continue
        check_section(name)
        inner = value
        if isinstance(value, BaseModel):
            inner = {key: getattr(value, key) for key in value.model_fields_set}
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise not_a_mapping(name, value)
        for key, one in inner.items():
            check_key(f"{name}.{key}")
            layer[f"{name}.{key}"] = Entry(one, origin)
    return layer


def check_section(name: object, *, hint: str | None = None) -> None:
    """Raise ConfigurationError unless `name` is a section; name the nearest, or where the key belongs."""
    if name in SECTIONS:
        return
    text = str(name)
    belongs = [key for key in known_keys() if key.partition(".")[2] == text.lower()]
    raise unknown_key(text, belongs, hint=hint) if belongs else unknown_key(text, list(SECTIONS), hint=hint)


def check_key(dotted: str, *, hint: str | None = None) -> None:
    """Raise ConfigurationError unless `dotted` is a setting; name the nearest, in its section or in
    another."""
    known = known_keys()
    if dotted in known:
        return
    section, _, key = dotted.partition(".")
    check_section(section, hint=hint)
    elsewhere = [one for one in known if one.partition(".")[2] == key.lower()]
    here = list(SECTIONS[section][1].model_fields)
    error = unknown_key(key, elsewhere or here, hint=hint)
    raise ConfigurationError(f"in {section}, {error.message}", key=dotted, hint=hint)


def full_key(name: str) -> str:
    """Return the dotted key of a setting that is named without its section; a section and a dotted key stay.

    Raises ConfigurationError, naming the nearest, for a name that no section has.
    """
    if name in SECTIONS or "." in name:
        return name
    found = [key for key in known_keys() if key.partition(".")[2] == name]
    if not found:
        raise unknown_key(name, [key.partition(".")[2] for key in known_keys()])
    return found[0]


def not_a_mapping(section: str, value: object) -> ConfigurationError:
    """Return the error for a section that is not a mapping of settings."""
    return ConfigurationError(
        f"{section} must be a mapping of settings, not {show(value)}",
        key=section,
        hint=f"Write the settings below `{section}:`, one `key: value` a line, each further in than it.",
    )


def _variable(key: str) -> str:
    return PREFIX + key.replace(".", "__").upper()


def _refuse_near_miss(name: str, variables: list[str]) -> None:
    """Raise when `name` looks like a setting; other LOADSTONE_ names are somebody else's."""
    single = {variable.replace("__", "_"): variable for variable in variables}
    if name in single:
        likely: str | None = single[name]
    elif name[len(PREFIX) :].lower() in SECTIONS:
        likely = next(variable for variable in variables if variable.startswith(f"{name}__"))
    elif "__" in name:
        found = nearest(name.lower(), [variable.lower() for variable in variables])
        likely = found.upper() if found else None
    else:
        return
    remedy = f"did you mean {likely}?" if likely else f"known sections are {', '.join(SECTIONS)}"
    raise ConfigurationError(
        f"the environment variable {name} is not a setting; {remedy}",
        key=name,
        hint=f"Unset it, or write {PREFIX}SECTION__KEY, with two underscores between section and key.",
    )


def _from_environment(key: str, raw: str) -> Any:
    """Return the value that a variable's text means for `key`.

    Settings that are text take it as it is (a revision may look like a number, a path may have a # in it)
    unless it is quoted; others are read as in the file.
    """
    section, _, name = key.partition(".")
    annotation = SECTIONS[section][1].model_fields[name].annotation
    takes_text = annotation in (str, str | None)
    if takes_text and raw[0] not in "'\"":
        return None if raw in ("null", "~") else raw
    from .yaml_file import parse_scalar

    value = parse_scalar(raw)
    if annotation is bool and value in (0, 1):  # VARIABLE=1 is how flags are set everywhere else
        return bool(value)
    if takes_text or name == "stop":
        return value if isinstance(value, (str, list)) else raw
    return value
