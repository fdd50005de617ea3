"""From the name of a model to its files: says which source a name belongs to, and asks it."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

from loadstone.errors import ConfigurationError, SourceError
from loadstone.telemetry import emit

from . import bundled
from .base import ModelFiles
from .hub import HubReference, hub_headers, resolve_hub
from .local import looks_local, resolve_local
from .remote import Headers

if TYPE_CHECKING:
    from loadstone.config import RetryConfig


def resolve(
    model: str, *, revision: str | None = None, offline: bool = False, retry: RetryConfig | None = None
) -> ModelFiles:
    """Return the files of `model`, fetching them first where they are not on this machine.

    `model` is a folder, a .safetensors or .gguf file, a Hub id `org/name[:variant][@revision]`, or `smollm2`.
    What exists as a path is a path. `offline` asks no network. Raises SourceError when the files cannot be
    had, CheckpointError when they are not a model's, ResourceError when they do not fit on the disk.
    """
    found = _named(model, revision)
    return resolve_hub(found, offline=offline, retry=retry) if isinstance(found, HubReference) else found


def resolve_headers(
    model: str, *, revision: str | None = None, offline: bool = False, retry: RetryConfig | None = None
) -> Headers:
    """Return the files of `model` as far as `checkpoint.inspect` reads them: what is not here is not fetched whole.

    Of weights on a Hub their headers alone are read: kilobytes of safetensors, megabytes of GGUF. Arguments and
    errors are those of `resolve`.
    """
    found = _named(model, revision)
    if isinstance(found, HubReference):
        return hub_headers(found, offline=offline, retry=retry)
    return Headers.of_local(found)


def _named(model: str, revision: str | None) -> ModelFiles | HubReference:
    """Return what a name stands for: files on this machine, or a model on a Hub."""
    if not model.strip() or "\0" in model:
        raise ConfigurationError(f"base_model is {model!r}; name a model", key="base_model")
    if model == bundled.NAME:
        _mention_unused(revision, model)
        return bundled.resolve_bundled()
    if os.path.exists(os.path.expanduser(model)):
        _mention_unused(revision, model)
        return resolve_local(model)
    reference = None if looks_local(model) else HubReference.parse(model, revision)
    if reference is not None:
        return reference
    if looks_local(model):
        return resolve_local(model)
    near = difflib.get_close_matches(model, [bundled.NAME, *sorted(os.listdir())], n=3)
    raise SourceError(
        f"{model!r} is no model: no such file or folder in {os.getcwd()}, not a Hub id (`org/name`), and not"
        f" `{bundled.NAME}`",
        hint=f"Near it: {', '.join(near)}" if near else None,
    )


def _mention_unused(revision: str | None, model: str) -> None:
    if revision is not None:
        message = f"revision {revision!r} is not used: only a Hub has revisions"
        emit("source.warning", model=model, message=message)
