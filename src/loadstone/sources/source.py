"""The seam of sources: what gives the files of a model by its name, and what is the same for all that fetch them.

A `Source` finds files in its own way. A `RemoteSource` only lists files and gives their bytes: which of them are
needed, the cache, room on the disk, resuming, checking, retrying, headers for plans, and being offline are done for it.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from loadstone.errors import ConfigurationError

from .base import Listing, ModelFiles, Reference, RemoteFile, Terms
from .cache import FileCache, downloads_folder
from .remote import Headers

_PATH = re.compile(r"(?P<path>\w[\w.-]*(?:/\w[\w.-]*)*)(?::(?P<variant>[\w.-]+))?(?:@(?P<revision>.+))?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)


class Source(ABC):
    """One kind of place that models come from; names that begin with its `name` and a colon are its own.

    `name` is lower-case letters and digits, two or more; `summary` says in a few words what it is, for people.
    """

    name: str
    summary: str

    @abstractmethod
    def resolve(self, model: str, terms: Terms) -> ModelFiles:
        """Return the files of `model` (its whole name, as it was asked for), fetching them where they are not here.

        Raises SourceError when they cannot be had, CheckpointError when they are not a model's, ResourceError when
        they do not fit on the disk, ConfigurationError when the name cannot be meant.
        """

    def headers(self, model: str, terms: Terms) -> Headers:
        """Return the files as far as `checkpoint.inspect` reads them, for plans before a download.

        A source that cannot read parts of files fetches them whole. Raises what `resolve` raises.
        """
        return Headers.of_local(self.resolve(model, terms))

    def path_of(self, model: str) -> str:
        """Return a name without this source's own prefix."""
        return model.removeprefix(f"{self.name}:")


class RemoteSource(Source):
    """A source that lists the files of a model, each with size and hash, and gives their bytes."""

    @abstractmethod
    def list_files(self, reference: Reference) -> Listing:
        """Return the files of a model: at least those that it is made ready from; one attempt.

        Raise TransientSourceError for what may go well a second time, SourceError for what will not. Other errors are
        translated: timeouts, broken connections, 408, 429 and 5xx are taken for transient.
        """

    @abstractmethod
    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file that `list_files` returned, in blocks of any size; one attempt.

        Raise NoPartsError where a place gives whole files only and `start` is far into one; else errors are as those of
        `list_files`. What is yielded is counted and compared with the file's hash: more than was asked for is damage.
        """

    def reference(self, model: str, terms: Terms) -> Reference:
        """Return what a name means: by default `name:path[:variant][@revision]`, a path of words between slashes.

        Raises ConfigurationError when it cannot be meant, or says another revision than `terms`.
        """
        path = self.path_of(model)
        match = _PATH.fullmatch(path)
        if match is None:
            raise ConfigurationError(
                f"{model!r} is no name of a model at {self.name}: {self.summary}",
                key="base_model",
                hint=f"Write {self.name}:path, {self.name}:path@revision or {self.name}:path:Q4_K_M.",
            )
        revision = one_revision(model, match["revision"], terms.revision)
        return Reference(f"{self.name}:{match['path']}", match["path"], revision, match["variant"])

    def cache(self, reference: Reference) -> FileCache:
        """Return where the files of a model are kept on this machine: by default in Loadstone's own cache folder."""
        digest = hashlib.sha256(reference.path.encode()).hexdigest()[:12]
        words = re.sub(r"[^\w.-]+", "--", reference.path, flags=re.ASCII).strip("-.")[-64:]
        return FileCache(downloads_folder(), f"{self.name}--{words}--{digest}", "LOADSTONE_HOME")

    def origin(self, reference: Reference) -> str:
        """Return where a model comes from, for people."""
        return f"{self.name}: {reference.path}"

    def place(self, reference: Reference) -> str:
        """Return the address of a model, for errors."""
        return reference.model

    def copy_of(self, reference: Reference, file: RemoteFile) -> Path | None:
        """Return a file of another program that may be `file`, or None; its content is compared before it is used."""
        return None

    def resolve(self, model: str, terms: Terms) -> ModelFiles:
        from .fetch import Fetch

        return Fetch(self, self.reference(model, terms), terms).files()

    def headers(self, model: str, terms: Terms) -> Headers:
        from .fetch import Fetch

        return Fetch(self, self.reference(model, terms), terms).headers()


def one_revision(model: str, said: str | None, asked: str | None) -> str | None:
    """Return the revision that a name and a setting say; raise ConfigurationError when they differ or cannot be one."""
    if said and asked and said != asked:
        raise ConfigurationError(
            f"{model!r} says one revision and `revision` another, {asked!r}",
            key="revision",
            hint="Say the revision once.",
        )
    wanted = said or asked
    if wanted is not None and (not _REVISION.fullmatch(wanted) or ".." in wanted):
        raise ConfigurationError(f"{wanted!r} cannot be a branch, tag or commit", key="revision")
    return wanted
