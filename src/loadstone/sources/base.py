"""What sources speak of: a model as it is asked for, what lies at its place, and its files on this machine's disk."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.errors import SourceError, TransientSourceError

if TYPE_CHECKING:
    from loadstone.config import RetryConfig

LARGEST_FILE = 2**62
"""Bytes; a size beyond it is not believed."""

MOST_FILES = 100_000
"""Names in a listing; a longer one is not believed."""

COMMIT = re.compile(r"[0-9a-f]{40}")
_IDENTITY = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, found or fetched.

    `weights` are the .safetensors shards or the one .gguf file, absolute; `folder` holds config.json, the
    tokenizer and the rest beside them. `origin` says where they come from, for people ("Hub:
    Qwen/Qwen2.5-7B-Instruct"); `revision` is the commit on the Hub, or what says elsewhere that nothing changed.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    origin: str
    revision: str | None = None

    @property
    def format(self) -> str:
        """ "gguf" or "safetensors"."""
        return "gguf" if self.weights and self.weights[0].suffix == ".gguf" else "safetensors"


@dataclass(frozen=True)
class Terms:
    """How a model is asked for: at which revision, without the network, and how often what fails is tried."""

    revision: str | None = None
    offline: bool = False
    retry: RetryConfig | None = None


@dataclass(frozen=True)
class Reference:
    """One model of a source that files are fetched from.

    `model` is its name without a revision, `path` what its source makes of the name ("org/name"), `revision` a branch,
    tag or the like (None: the newest), and `variant` picks one of several GGUF files by the end of its name ("Q4_K_M").
    """

    model: str
    path: str
    revision: str | None = None
    variant: str | None = None

    @property
    def is_fixed(self) -> bool:
        """True when the revision is a digest, of a commit or of the files: what it names never changes."""
        return self.revision is not None and _IDENTITY.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class RemoteFile:
    """One file as its source lists it: `size` in bytes, `identity` of its content in lower-case hex.

    An identity of 64 digits is the SHA-256 of the content, one of 40 that of a git blob. `name` is relative to the
    model's folder, with "/" between its parts. `place` is for the source that listed it: a URL, say.
    """

    name: str
    size: int
    identity: str
    place: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a model at one commit: 40 hex digits, which change when any of the files does.

    Raises SourceError for a commit, a size or an identity that cannot be one: they become names of files here.
    """

    commit: str
    files: Mapping[str, RemoteFile]

    def __post_init__(self) -> None:
        if not COMMIT.fullmatch(self.commit):
            raise SourceError(f"{self.commit!r} is listed as the commit of files, and is no such thing")
        if len(self.files) > MOST_FILES:
            raise SourceError(f"more than {MOST_FILES} files are listed, which no model has")
        for file in self.files.values():
            if not isinstance(file.size, int) or not 0 <= file.size <= LARGEST_FILE:
                raise SourceError(f"{file.name!r} is listed with a size of {file.size!r} bytes")
            if not _IDENTITY.fullmatch(file.identity):
                raise SourceError(f"{file.name!r} is listed without the hash of its content")

    @classmethod
    def of(cls, files: Iterable[RemoteFile], commit: str | None = None) -> Listing:
        """Return the listing of `files`; without a commit, their names and identities make one."""
        by_name = {file.name: file for file in files}
        return cls(commit or _digest(by_name.values()), by_name)


class NoRouteError(TransientSourceError):
    """A place could not even be reached: no such name, no route, or a refused connection."""


class NoPartsError(SourceError):
    """A place gives whole files only, and the part that was asked for is too far into one."""


def _digest(files: Iterable[RemoteFile]) -> str:
    lines = sorted(f"{file.identity} {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]
