"""From the name of a model to its files: says which source a name belongs to, and asks it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadstone.errors import ConfigurationError, LoadstoneError, SourceError

from . import bundled
from .base import ModelFiles, Terms
from .hub import is_hub_name
from .local import looks_local
from .registry import SOURCES
from .remote import Headers
from .source import Source

if TYPE_CHECKING:
    from loadstone.config import RetryConfig

_PREFIX = re.compile(r"([a-z][a-z0-9]+):")  # of two letters or more: `C:` is a disk


def resolve(
    model: str, *, revision: str | None = None, offline: bool = False, retry: RetryConfig | None = None
) -> ModelFiles:
    """Return the files of `model`, fetching them first where they are not on this machine.

    `model` is a folder, a .safetensors or .gguf file, a Hub id `org/name[:variant][@revision]`, `smollm2`, or the name
    of a source and what that makes of the rest: `modelscope:org/name`, `https://host/folder/`, `s3://bucket/folder`, a
    plug-in's. What exists as a path is a path. `offline` asks no network. Raises SourceError when the files cannot be
    had, CheckpointError when they are not a model's, ResourceError when they do not fit on the disk,
    ConfigurationError for a name that cannot be meant or whose plug-in is broken.
    """
    source = source_of(model)
    with _translated(source, model):
        return source.resolve(model, Terms(revision, offline, retry))


def resolve_headers(
    model: str, *, revision: str | None = None, offline: bool = False, retry: RetryConfig | None = None
) -> Headers:
    """Return the files of `model` as far as `checkpoint.inspect` reads them: what is not here is not fetched whole.

    Of weights elsewhere their headers alone are read: kilobytes of safetensors, megabytes of GGUF. Arguments and
    errors are those of `resolve`.
    """
    source = source_of(model)
    with _translated(source, model):
        return source.headers(model, Terms(revision, offline, retry))


def source_of(model: str) -> Source:
    """Return the source that a name belongs to; raise as `resolve` does when there is none."""
    if not model.strip() or "\0" in model:
        raise ConfigurationError(f"base_model is {model!r}; name a model", key="base_model")
    if model == bundled.NAME:
        return _known("bundled")
    if os.path.exists(os.path.expanduser(model)):
        return _known("local")
    prefix = _PREFIX.match(model)
    found = SOURCES.find(prefix[1]) if prefix else None
    if found is not None:
        return found
    if prefix and model.startswith("//", prefix.end()):
        raise SourceError(
            f"{model!r}: no source is called {prefix[1]!r}; known are {', '.join(SOURCES.names())}",
            hint="Install the plug-in that has it (entry point `loadstone.sources`), or fetch the folder and name it.",
        )
    if not looks_local(model) and is_hub_name(model):
        return _known("hub")
    if looks_local(model):
        return _known("local")
    near = difflib.get_close_matches(model, [bundled.NAME, *sorted(os.listdir())], n=3)
    raise SourceError(
        f"{model!r} is no model: no such file or folder in {os.getcwd()}, not a Hub id (`org/name`), not"
        f" `{bundled.NAME}`, and no name of another source ({', '.join(SOURCES.names())})",
        hint=f"Near it: {', '.join(near)}" if near else None,
    )


def _known(name: str) -> Source:
    found = SOURCES.find(name)
    assert found is not None  # it is built in
    return found


@contextmanager
def _translated(source: Source, model: str) -> Iterator[None]:
    """Make errors of ours of whatever a plug-in raises."""
    try:
        yield
    except LoadstoneError:
        raise
    except Exception as error:
        raise SourceError(f"{model}: the source {source.name!r} failed: {type(error).__name__}: {error}") from error
