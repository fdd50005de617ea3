"""Models on a Hub: what is needed of them, fetched into the Hub's own cache, or found there.

Knows the order of things and what to do when the network fails; HTTP is in `_huggingface`, the disk in
`hub_cache`. Everything is asked of one commit, so a branch that moves meanwhile cannot mix two models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loadstone.errors import (
    CheckpointError,
    ConfigurationError,
    ResourceError,
    SourceError,
    TransientSourceError,
    is_transient,
)
from loadstone.retry import retry_call
from loadstone.telemetry import emit, timed
from loadstone.units import format_size

from .base import Listing, ModelFiles, NoRouteError, RemoteFile
from .choose import COMPANIONS, CONFIG, GENERATION, INDEX, LARGEST_INDEX, SINGLE, TOKENIZER, choose_weights
from .hub_cache import COMMIT, HubCache, cache_root, free_bytes
from .local import SUFFIXES, from_folder, read_index
from .remote import Headers, RemoteWeights, read_beginnings

if TYPE_CHECKING:
    from loadstone.config import RetryConfig

ENDPOINT = "https://huggingface.co"
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ENOUGH_PROGRESS = 16 * 2**20
"""Bytes; a line that breaks, but only after this much more has arrived, does not use up attempts."""

Result = TypeVar("Result")
_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<variant>[\w.-]+))?(?:@(?P<revision>.+))?", re.ASCII)
_REVISION = re.compile(r"[\w][\w.+-]*(?:/[\w][\w.+-]*)*", re.ASCII)


@dataclass(frozen=True)
class HubReference:
    """A model on a Hub: `repository` ("org/name"), perhaps a `revision` and a GGUF `variant` ("Q4_K_M")."""

    repository: str
    revision: str | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, model: str, revision: str | None = None) -> HubReference | None:
        """Return the reference that `org/name[:variant][@revision]` is; None when `model` is not like that.

        Raises ConfigurationError when the revision is said twice, differently, or cannot be one.
        """
        match = _ID.fullmatch(model)
        if match is None:
            return None
        said = match["revision"]
        if said and revision and said != revision:
            raise ConfigurationError(
                f"{model!r} says one revision and `revision` another, {revision!r}",
                key="revision",
                hint="Say the revision once.",
            )
        wanted = said or revision
        if wanted is not None and (not _REVISION.fullmatch(wanted) or ".." in wanted):
            raise ConfigurationError(f"{wanted!r} cannot be a branch, tag or commit", key="revision")
        return cls(match["id"], wanted, match["variant"])


def resolve_hub(reference: HubReference, *, offline: bool = False, retry: RetryConfig | None = None) -> ModelFiles:
    """Return the files of a model on the Hub, fetching those that are not in the cache.

    Raises SourceError when they cannot be had and why, CheckpointError when they are not a model's,
    ResourceError when the disk has no room for them.
    """
    fetch = _Fetch(reference, HubCache(cache_root(), reference.repository), retry)
    found = fetch.cached_or_listed(offline)
    return found if isinstance(found, ModelFiles) else fetch.download(found)


def hub_headers(reference: HubReference, *, offline: bool = False, retry: RetryConfig | None = None) -> Headers:
    """Return a model's files as `resolve_hub` does, but of weights that are not in the cache only the places.

    Small files are fetched into the cache. Raises what `resolve_hub` raises.
    """
    fetch = _Fetch(reference, HubCache(cache_root(), reference.repository), retry)
    found = fetch.cached_or_listed(offline)
    return Headers.of_local(found) if isinstance(found, ModelFiles) else fetch.headers(found)


@dataclass(frozen=True)
class HubWeights:
    """The weights of a model in the Hub's cache."""

    cache: HubCache
    commit: str
    names: tuple[str, ...]

    def remove(self) -> int:
        """Remove them, but for what another revision has too; return the bytes freed. Other files stay."""
        return self.cache.remove(self.commit, self.names)


def hub_weights(files: ModelFiles) -> HubWeights | None:
    """Return a model's weights as the Hub's cache has them, or None when they are not from there."""
    reference = HubReference.parse(files.name)
    if reference is None or files.revision is None:
        return None
    cache = HubCache(cache_root(), reference.repository)
    is_there = files.folder == cache.snapshot(files.revision)
    return HubWeights(cache, files.revision, tuple(file.name for file in files.weights)) if is_there else None


@dataclass(frozen=True)
class _Fetch:
    """One model's way from the Hub to the cache."""

    reference: HubReference
    cache: HubCache
    retry: RetryConfig | None

    def cached_or_listed(self, offline: bool) -> ModelFiles | Listing:
        """Return the files in the cache, where nothing is to be asked or nobody answers, or else what the Hub has."""
        if offline or is_offline():
            return self.cached_or("offline was asked for, and no")
        if self.reference.revision and COMMIT.fullmatch(self.reference.revision):
            found = self.cached()
            # A commit never changes, so there is nothing to ask; unless a program that needs less fetched it.
            if found is not None and (self.reference.variant or (found.folder / TOKENIZER).is_file()):
                return found
        try:
            return self.list_files()
        except TransientSourceError as error:
            found = self.cached()
            if found is None:
                raise
            message = f"the cached copy is used: {error.message}"
            emit("source.warning", model=self.reference.repository, message=message)
            return found

    def cached(self) -> ModelFiles | None:
        """Return the files in the cache if they are all there, without asking the network."""
        try:
            return self.cached_or("no")
        except SourceError:
            return None

    def cached_or(self, reason: str) -> ModelFiles:
        """Return the files in the cache; raise SourceError, with `reason`, if they are not all there."""
        repository, revision = self.reference.repository, self.reference.revision
        hint = "Go online once to fetch it (unset HF_HUB_OFFLINE, `offline: false`)."
        commit = self.cache.commit_of(revision)
        if commit is None or not self.cache.snapshot(commit).is_dir():
            at = f" at {revision!r}" if revision else ""
            raise SourceError(f"{repository}{at}: {reason} copy is in the cache {self.cache.root}", hint=hint)
        try:
            return self._in_snapshot(commit)
        except (CheckpointError, OSError) as error:
            raise SourceError(f"{repository}: {reason} whole copy is in the cache: {error}", hint=hint) from error

    def list_files(self) -> Listing:
        """Ask the Hub which files there are; once only when it is out of reach and a copy is cached."""
        from . import _huggingface

        def retry_if(error: BaseException) -> bool:
            return is_transient(error) and not (isinstance(error, NoRouteError) and self.cached() is not None)

        repository, revision = self.reference.repository, self.reference.revision
        return self._attempt(
            f"list the files of {repository}",
            lambda: _huggingface.list_files(repository, revision, endpoint()),
            retry_if,
        )

    def download(self, listing: Listing) -> ModelFiles:
        """Fetch what is needed of `listing` and is not in the cache; return all of it."""
        names = self._needed(listing)
        files = [listing.files[name] for name in names]
        missing = self.cache.bytes_missing(listing.commit, files)
        self._need_room(missing)
        if missing:
            with timed("source.download", model=self.reference.repository, files=len(files), bytes=missing):
                for file in files:
                    self._download(listing, file)
        try:
            self.cache.publish(listing, names, self.reference.revision)
        except OSError as error:
            raise self._unwritable(error) from error
        return self._in_snapshot(listing.commit)

    def headers(self, listing: Listing) -> Headers:
        """Fetch the small files that say what the model is; of the weights return where to read their beginnings."""
        needed = self._needed(listing)
        weights = [listing.files[name] for name in needed if name.endswith(SUFFIXES)]
        small = [listing.files[name] for name in (CONFIG, GENERATION, INDEX) if name in needed]
        for file in small:
            if file.size > LARGEST_INDEX:
                raise CheckpointError(f"{file.name} has {file.size} bytes, more than is believed", file=file.name)
            self._download(listing, file)
        snapshot = self.cache.snapshot(listing.commit)
        try:
            self.cache.give_names(listing, [file.name for file in small])
        except OSError as error:
            raise self._unwritable(error) from error
        places = tuple(snapshot / file.name for file in weights)
        files = ModelFiles(self.reference.repository, snapshot, places, self._origin(), listing.commit)
        missing = [file for file in weights if self.cache.content(listing.commit, file) != snapshot / file.name]
        remote = {
            snapshot / file.name: RemoteWeights(file, self._range_reader(listing.commit, file)) for file in missing
        }
        with timed("source.headers", model=self.reference.repository, files=len(missing)) as more:
            read_beginnings(remote.values())
            more["bytes"] = sum(one.arrived for one in remote.values())
        to_fetch = self.cache.bytes_missing(listing.commit, (listing.files[name] for name in needed))
        return Headers(files, remote, sum(file.size for file in weights), to_fetch)

    def _range_reader(self, commit: str, file: RemoteFile) -> Callable[[int, int], bytes]:
        from . import _huggingface

        def read(start: int, length: int) -> bytes:
            return self._attempt(
                f"read the header of {file.name} of {self.reference.repository}",
                lambda: _huggingface.read_range(self.cache.repository, commit, file, endpoint(), start, length),
                about={"file": file.name},
            )

        return read

    def _needed(self, listing: Listing) -> list[str]:
        """Return the names of the files that are needed, weights last."""
        place = f"{endpoint()}/{self.reference.repository}"

        def index() -> bytes:
            self._need_room(listing.files[INDEX].size)
            return read_index(self._download(listing, listing.files[INDEX]))

        weights = choose_weights(
            listing.files,
            place=place,
            read_index=index,
            variant=self.reference.variant,
            prefers_q4_k_m=True,
        )
        if weights[0].endswith(".gguf"):
            emit("source.choice", model=self.reference.repository, file=weights[0])
        elif CONFIG not in listing.files:
            raise CheckpointError(f"{CONFIG} is missing", file=place, hint="Choose a repository that has it.")
        companions = [name for name in COMPANIONS if name in listing.files]
        is_indexed = INDEX in listing.files and weights[0] != SINGLE and not weights[0].endswith(".gguf")
        return companions + ([INDEX] if is_indexed else []) + list(weights)

    def _download(self, listing: Listing, file: RemoteFile) -> Path:
        from . import _huggingface

        repository = self.reference.repository
        while (content := self.cache.content(listing.commit, file)) is None:
            before = self.cache.bytes_arrived(file)
            try:
                self._attempt(
                    f"fetch {file.name} of {repository}",
                    lambda: _huggingface.download(self.cache, listing.commit, file, endpoint()),
                    about={"file": file.name, "bytes": file.size},
                )
            except TransientSourceError:
                if self.cache.bytes_arrived(file) - before < ENOUGH_PROGRESS:
                    raise
        return content

    def _attempt(
        self,
        action: str,
        function: Callable[[], Result],
        retry_if: Callable[[BaseException], bool] = is_transient,
        about: Mapping[str, Any] | None = None,
    ) -> Result:
        policy = self.retry
        return retry_call(
            function,
            max_attempts=policy.max_attempts if policy else 3,
            first_wait=policy.first_wait if policy else 1.0,
            max_wait=policy.max_wait if policy else 30.0,
            retry_if=retry_if,
            action=action,
            event="source.retry",
            about={"model": self.reference.repository, "phase": "resolve", **(about or {})},
        )

    def _need_room(self, needed: int) -> None:
        free = free_bytes(self.cache.root)
        if needed > free:
            raise ResourceError(
                f"{self.reference.repository} needs {format_size(needed)} more on disk; in the Hub's cache"
                f" ({self.cache.root}) {format_size(free)} are free",
                needed=needed,
                allowed=free,
                hint="Make room, or set HF_HOME to a folder on a larger disk.",
            )

    def _unwritable(self, error: OSError) -> SourceError:
        return SourceError(f"{self.cache.folder} cannot be written: {error}", hint="Set HF_HOME to a folder that can.")

    def _origin(self) -> str:
        where = endpoint()
        return f"Hub: {self.reference.repository}" + ("" if where == ENDPOINT else f" at {where}")

    def _in_snapshot(self, commit: str) -> ModelFiles:
        return from_folder(
            self.cache.snapshot(commit),
            name=self.reference.repository,
            origin=self._origin(),
            revision=commit,
            variant=self.reference.variant,
            prefers_q4_k_m=True,
        )


def endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT as it is now, or the Hub's own."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Tell whether the Hub's own variables say to ask no network."""
    said = (os.environ.get(name, "") for name in OFFLINE_VARIABLES)
    return any(value.strip().upper() in {"1", "ON", "YES", "TRUE"} for value in said)
