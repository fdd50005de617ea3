"""Models that lie on this machine: a folder, one .safetensors file, one .gguf file.

Knows names and places; opens nothing but the index of a sharded checkpoint.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from loadstone.errors import CheckpointError, SourceError
from loadstone.telemetry import emit

from .base import ModelFiles, Terms
from .choose import CONFIG, INDEX, LARGEST_INDEX, PICKLES, choose_weights, refuse_pickles, shards_of
from .source import Source

SUFFIXES = (".safetensors", ".gguf")


def looks_local(model: str) -> bool:
    """Tell whether `model` can only be meant as a path: by how it begins or ends, or because it exists."""
    return (
        model.startswith(("/", ".", "~"))
        or "\\" in model
        or re.match(r"[A-Za-z]:", model) is not None
        or model.endswith((*SUFFIXES, *PICKLES, "/"))
        or model.partition("@")[0].count("/") > 1
        or os.path.lexists(model)
    )


class Local(Source):
    """Folders and files of this machine; `~` is the home folder."""

    name = "local"
    summary = "a folder, a .safetensors file or a .gguf file on this machine"

    def resolve(self, model: str, terms: Terms) -> ModelFiles:
        mention_unused(terms, model)
        path = Path(os.path.abspath(os.path.expanduser(self.path_of(model))))
        try:
            if os.path.isdir(path):
                return from_folder(path)
            if os.path.isfile(path):
                return _from_file(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}", hint="Check who may read it.") from error
        raise _not_there(path)


def mention_unused(terms: Terms, model: str) -> None:
    """Say that a revision was asked for where there are none."""
    if terms.revision is not None:
        message = f"revision {terms.revision!r} is not used: only hubs have revisions"
        emit("source.warning", model=model, message=message)


def from_folder(
    folder: Path,
    *,
    name: str | None = None,
    origin: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    prefers_q4_k_m: bool = False,
) -> ModelFiles:
    """Return the files of the model in `folder`; the arguments say what it is when the folder does not."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    weights = choose_weights(
        names,
        place=str(folder),
        read_index=lambda: read_index(folder / INDEX),
        variant=variant,
        prefers_q4_k_m=prefers_q4_k_m,
    )
    if not weights[0].endswith(".gguf"):
        _need_config(folder)
    return ModelFiles(
        name=name or folder.name,
        folder=folder,
        weights=tuple(folder / one for one in weights),
        origin=origin or f"folder: {folder}",
        revision=revision,
    )


def read_index(file: Path) -> bytes:
    """Return the bytes of an index, at most one more than the largest that is believed."""
    with file.open("rb") as stream:
        return stream.read(LARGEST_INDEX + 1)


def _from_file(file: Path) -> ModelFiles:
    if file.suffix not in SUFFIXES:
        refuse_pickles([file.name], str(file.parent))
        raise CheckpointError(
            "this is neither a .safetensors nor a .gguf file",
            file=file,
            hint="Name a model's folder, or such a file.",
        )
    if file.suffix == ".safetensors":
        _need_config(file.parent)
        _need_whole(file)
    return ModelFiles(name=file.stem, folder=file.parent, weights=(file,), origin=f"file: {file}", revision=None)


def _need_config(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{CONFIG} is missing; .safetensors files do not say their architecture",
            file=folder,
            hint=f"Put the model's {CONFIG} beside its weights.",
        )


def _need_whole(file: Path) -> None:
    """Raise CheckpointError when `file` is only one shard of the model in its folder."""
    index = file.parent / INDEX
    shards = shards_of(read_index(index), str(index)) if index.is_file() else ()
    if len(shards) > 1 and file.name in shards:
        raise CheckpointError(
            f"this is one of {len(shards)} shards", file=file, hint=f"Name the folder instead: {file.parent}"
        )


def _not_there(path: Path) -> SourceError:
    """Return the error for a path where nothing is, with the names that are nearest to it."""
    parent = path.parent
    while not os.path.isdir(parent):
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    try:
        names = os.listdir(parent)
    except OSError:
        names = []
    near = difflib.get_close_matches(missing, names, n=3)
    wanted = "a folder with .safetensors or .gguf files, or such a file"
    return SourceError(
        f"{path} does not exist; looked for {wanted}"
        + ("" if parent == path.parent else f" ({parent} is there, {missing!r} in it is not)"),
        hint=f"Near it: {', '.join(str(parent / name) for name in near)}" if near else None,
    )
