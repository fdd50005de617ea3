"""Reads a configuration file into (key, value, line), through PyYAML's node tree, which knows lines.

Knows YAML and what a file can have wrong, not which keys exist. No object but plain ones is ever made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loadstone.errors import ConfigurationError
from loadstone.units import format_size

_LARGEST_FILE = 2**20
_NULL = "tag:yaml.org,2002:null"
_AS_TEXT = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number and a date as text, as people mean them here."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _AS_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class Document:
    """A configuration file that has been read: an iterator over its mappings, with lines."""

    def __init__(self, path: Path) -> None:
        """Read and parse `path`; raise ConfigurationError, with file and line, when that cannot be done."""
        self.path = path
        self._loader: _Loader
        self._root: yaml.Node | None
        text = _read(path)
        try:
            self._loader = _Loader(text)
            self._root = self._loader.get_single_node()
        except yaml.YAMLError as error:
            raise _syntax_error(path, text, error) from error
        except RecursionError as error:
            raise ConfigurationError(
                "it is nested too deeply to be read", file=path, hint="A section has one level of keys."
            ) from error

    def sections(self) -> Iterator[tuple[str, yaml.Node, int]]:
        """Yield each top-level key, what is below it, and its line; nothing for an empty file."""
        if self._root is None or self._root.tag == _NULL:
            return
        if not isinstance(self._root, yaml.MappingNode):
            raise ConfigurationError(
                "the file must be a mapping of sections",
                file=self.path,
                line=self._root.start_mark.line + 1,
                hint="Begin it with `model_config:` and write the settings below, further in.",
            )
        yield from self._pairs(self._root)

    def settings(self, section: yaml.Node) -> Iterator[tuple[str, Any, int]] | None:
        """Return the keys of a section with values and lines, or None when it is not a mapping."""
        if section.tag == _NULL:
            return iter(())
        if not isinstance(section, yaml.MappingNode):
            return None
        return ((key, self.value(node, key), line) for key, node, line in self._pairs(section))

    def value(self, node: yaml.Node, key: str) -> Any:
        """Return the plain object that `node`, the value of `key`, stands for."""
        try:
            return self._loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise ConfigurationError(
                f"the value of {key} cannot be read: {getattr(error, 'problem', None) or error}",
                file=self.path,
                line=node.start_mark.line + 1,
                key=key,
                hint="Write a plain text, number, true or false, or a list of these.",
            ) from error

    def _pairs(self, mapping: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, int]]:
        lines: dict[str, int] = {}
        for key_node, value_node in mapping.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigurationError("a key must be one word", file=self.path, line=line)
            key = key_node.value
            if key in lines:
                raise ConfigurationError(
                    f"{key!r} is here for the second time; the first is in line {lines[key]}",
                    file=self.path,
                    line=line,
                    key=key,
                    hint="Remove one of them.",
                )
            lines[key] = line
            yield key, value_node, line


def parse_scalar(text: str) -> Any:
    """Return what `text` would mean as a value in a file, or `text` itself where it is no YAML."""
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise ConfigurationError(
            "there is no such file", file=path, hint="Check the path, or leave it out to use the defaults."
        ) from error
    except IsADirectoryError as error:
        raise ConfigurationError(
            "it is a directory, not a file", file=path, hint="Name the YAML file in it."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"it cannot be read: {reason}", file=path, hint="Check its permissions.") from error
    if len(data) > _LARGEST_FILE:
        raise ConfigurationError(
            f"it is larger than {format_size(_LARGEST_FILE)}, so it is no configuration file",
            file=path,
            hint="Name a YAML file; a model is named by `base_model`.",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"byte {error.start} is not UTF-8",
            file=path,
            line=data.count(b"\n", 0, error.start) + 1,
            hint="Save it as UTF-8.",
        ) from error


def _syntax_error(path: Path, text: str, error: yaml.YAMLError) -> ConfigurationError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    position = getattr(error, "position", None)
    line = None
    if mark is not None:
        line = mark.line + 1
    elif isinstance(position, int):  # a character that YAML does not allow has a position alone
        line = text.count("\n", 0, position) + 1
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    return ConfigurationError(
        f"not YAML: {problem.removeprefix('but ')}",
        file=path,
        line=line,
        hint="Write `key: value`, indented with spaces, and put text with : or # in it in quotes.",
    )
