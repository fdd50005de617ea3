"""Puts the layers together: defaults < file < environment < what the caller gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loadstone.errors import ConfigurationError

from .generation import GenerationConfig, generation_from_checkpoint
from .layers import (
    Entry,
    Layer,
    check_key,
    check_section,
    environment_layer,
    find_file,
    full_key,
    mapping_layer,
    not_a_mapping,
)
from .schema import SECTIONS, LoadstoneConfig
from .wish import show

Read = tuple[tuple[Layer, ...], tuple[Path, ...]]  # layers, weakest first, and the files that were read
Reader = Callable[[], Read]


class ConfigManager:
    """The configuration in force, and where each value comes from. It never changes once made."""

    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any] | ConfigManager | LoadstoneConfig | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Read and check the configuration; raise ConfigurationError for whatever cannot be meant.

        `config` is None (the file that is found, if any), a file's path (which must exist), a mapping in the
        file's shape (no file is read), another manager, or a finished LoadstoneConfig (neither file nor
        environment is read). The environment goes over a file, and under what the caller gives. `overrides`
        go over everything; their keys are dotted ("model_config.device") or nested, and a value of None is a
        value.
        """
        self._read: Reader
        self._over: tuple[Layer, ...] = ()
        if isinstance(config, ConfigManager):
            self._read, self._over, said = config._read, config._over, (config._below, config._files)
        else:
            self._read = _reader(config)
            said = self._read()
        if overrides:
            self._over = (*self._over, mapping_layer(overrides, dotted=True))
        self._settle(*said)

    def _settle(self, below: tuple[Layer, ...], files: tuple[Path, ...]) -> None:
        self._below, self._files = below, files
        self._entries: dict[str, Entry] = {}
        for layer in (*below, *self._over):
            self._entries.update(layer)
        self._config = _build(self._entries)

    @property
    def config(self) -> LoadstoneConfig:
        """The configuration in force."""
        return self._config

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read."""
        return self._files

    def origin(self, key: str) -> str:
        """Return where the value of `key` comes from.

        That is a file and line ("config/config.yaml:4"), a variable's name, "argument" or "default". Raises
        ConfigurationError for a key that does not exist.
        """
        check_key(key)
        entry = self._entries.get(key)
        return entry.origin if entry else "default"

    def generation_layers(
        self, checkpoint: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[tuple[str, GenerationConfig], ...]:
        """Return what is said about generation, one layer for each origin, as `resolve_generation` takes them.

        The weakest is what the model's maker recommends: `checkpoint` is its generation_config.json.
        """
        said: dict[str, dict[str, Any]] = {}
        for name in GenerationConfig.model_fields:
            value = getattr(self._config.generation, name)
            if value is not None:
                said.setdefault(self.origin(f"generation.{name}"), {})[name] = value
        recommended = ("generation_config.json", generation_from_checkpoint(checkpoint))
        return (recommended, *((origin, GenerationConfig(**values)) for origin, values in said.items()))

    def with_overrides(self, overrides: Mapping[str, Any]) -> ConfigManager:
        """Return a manager in which `overrides` go over everything; this one stays as it is."""
        return ConfigManager(self, overrides=overrides)

    def with_settings(self, settings: Mapping[str, Any]) -> ConfigManager:
        """Return a manager in which `settings` go over everything, named without their section: quantization, top_p.

        A section with a mapping and a dotted key mean what they mean in `with_overrides`.
        """
        return self.with_overrides({full_key(name): value for name, value in settings.items()})

    def read_again(self) -> ConfigManager:
        """Return what files and environment say now, below what the caller gave; this one stays as it is.

        A file that was found is looked for where it was. Raises ConfigurationError as in the beginning.
        """
        fresh = copy(self)
        fresh._settle(*self._read())
        return fresh

    def __repr__(self) -> str:
        """Show the files and what was said, not the defaults."""
        said = ", ".join(f"{key}={show(entry.value)}" for key, entry in self._entries.items())
        return f"ConfigManager(files={[str(file) for file in self._files]}, {said or 'defaults'})"


def _reader(config: object) -> Reader:
    """Return what reads the layers that `config` stands for, weakest first, as often as it is asked."""
    if isinstance(config, LoadstoneConfig):
        sections = {name: getattr(config, attribute) for name, (attribute, _) in SECTIONS.items()}
        return partial(_said, mapping_layer(sections))
    if isinstance(config, Mapping):
        return partial(_said_over_environment, mapping_layer(config))
    if config is None:
        path = find_file(os.environ)
        if path is None:
            return partial(_said_over_environment, {})
        return partial(_read_file, path, path.absolute(), explicit=bool(os.environ.get("LOADSTONE_CONFIG")))
    if isinstance(config, (str, os.PathLike)):
        path = Path(os.path.expanduser(config))
        return partial(_read_file, path, path.absolute(), explicit=True)
    raise ConfigurationError(
        f"config is {show(config)}",
        hint="Give None, a path, a mapping in the file's shape, a ConfigManager or a LoadstoneConfig.",
    )


# Functions of the module, and not within another, so that a manager can be pickled.


def _said(layer: Layer) -> Read:
    return (layer,), ()


def _said_over_environment(layer: Layer) -> Read:
    return (environment_layer(os.environ), layer), ()


def _read_file(path: Path, place: Path, *, explicit: bool) -> Read:
    """Read the file at `path`, which was at `place` when it was found: the working directory may be another by now."""
    here = path if path.absolute() == place else place
    return (_file_layer(here, explicit=explicit), environment_layer(os.environ)), (here,)


def _file_layer(path: Path, *, explicit: bool) -> Layer:
    """Return what the file at `path` says; `explicit` tells that somebody named it."""
    from .yaml_file import Document  # only where there is a file: its import takes time

    document = Document(path)
    layer: dict[str, Entry] = {}
    stranger = None if explicit else "If this file is not for Loadstone, name another with LOADSTONE_CONFIG."
    for section, node, line in document.sections():
        with _Place(path, line):
            check_section(section, hint=stranger)
            settings = document.settings(node)
            if settings is None:
                raise not_a_mapping(section, document.value(node, section))
        for key, value, key_line in settings:
            with _Place(path, key_line):
                check_key(f"{section}.{key}")
            layer[f"{section}.{key}"] = Entry(value, f"{path}:{key_line}", path, key_line)
    return layer


def _build(entries: Mapping[str, Entry]) -> LoadstoneConfig:
    """Return the checked configuration; an error says where its value was written."""
    sections: dict[str, Any] = {}
    for name, (attribute, wish) in SECTIONS.items():
        said = {key: entries[f"{name}.{key}"] for key in wish.model_fields if f"{name}.{key}" in entries}
        try:
            sections[attribute] = wish(**{key: entry.value for key, entry in said.items()})
        except ConfigurationError as error:
            key = error.key or ""
            entry = said[key.partition(".")[0]]
            place = "" if entry.file else f"{entry.origin}: "
            raise ConfigurationError(
                f"{place}{name}.{error.message}",
                file=entry.file,
                line=entry.line,
                key=f"{name}.{key}",
                hint=error.hint,
            ) from None
    return LoadstoneConfig(**sections)


class _Place:
    """Adds a file and a line to a ConfigurationError that does not have them."""

    def __init__(self, file: Path, line: int) -> None:
        self.file, self.line = file, line

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConfigurationError) and error.file is None:
            raise ConfigurationError(
                error.message, file=self.file, line=self.line, key=error.key, hint=error.hint
            ) from None
