"""What a source gives: the files of one model at one revision, on this machine's disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadstone.errors import TransientSourceError


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, found or fetched.

    `weights` are the .safetensors shards or the one .gguf file, absolute; `folder` holds config.json, the
    tokenizer and the rest beside them. `origin` says where they come from, for people ("Hub:
    Qwen/Qwen2.5-7B-Instruct"); `revision` is the commit on the Hub.
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
class RemoteFile:
    """One file of a repository, as its hub lists it: `size` in bytes, `identity` of its content in hex.

    A large file's identity is its SHA-256 (64 digits); a small one's is that of its git blob (40 digits).
    """

    name: str
    size: int
    identity: str


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit (40 hex digits)."""

    commit: str
    files: Mapping[str, RemoteFile]


class NoRouteError(TransientSourceError):
    """The hub could not even be reached: no such name, no route, or a refused connection."""
