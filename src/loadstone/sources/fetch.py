"""One model's way from its source to the cache: what is needed of it, fetched, or found there.

Knows the order of things and what to do when the network fails; how a place is asked is its source's matter, and the
disk that of `cache` and `incoming`. Everything is of one listing, so a branch that moves cannot mix two models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loadstone.errors import (
    CheckpointError,
    LoadstoneError,
    ResourceError,
    SourceError,
    TransientSourceError,
    is_transient,
    wait_asked_for,
)
from loadstone.retry import retry_call
from loadstone.telemetry import emit, timed
from loadstone.units import format_size

from .base import Listing, ModelFiles, NoRouteError, Reference, RemoteFile, Terms
from .cache import FileCache, free_bytes
from .choose import (
    COMPANIONS,
    CONFIG,
    GENERATION,
    INDEX,
    LARGEST_INDEX,
    SINGLE,
    TOKENIZER,
    check_plain_name,
    choose_weights,
)
from .incoming import adopt, bring
from .local import SUFFIXES, from_folder, read_index
from .remote import Headers, RemoteWeights, read_beginnings
from .source import RemoteSource

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
ENOUGH_PROGRESS = 16 * 2**20
"""Bytes; a line that breaks, but only after this much more has arrived, does not use up attempts."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fetch:
    """One model of a source that lists files, asked for on some terms."""

    source: RemoteSource
    reference: Reference
    terms: Terms

    @property
    def cache(self) -> FileCache:
        """Where its files are kept here."""
        return self.source.cache(self.reference)

    @property
    def model(self) -> str:
        """What it is called."""
        return self.reference.model

    def files(self) -> ModelFiles:
        """Return the files, fetching those that are not in the cache."""
        found = self._cached_or_listed()
        return found if isinstance(found, ModelFiles) else self._download(found)

    def headers(self) -> Headers:
        """Return the files, but of weights that are not in the cache only the places."""
        found = self._cached_or_listed()
        return Headers.of_local(found) if isinstance(found, ModelFiles) else self._headers(found)

    # -- in the cache --------------------------------------------------------------------------------------------------

    def _cached_or_listed(self) -> ModelFiles | Listing:
        """Return the files in the cache, where nothing is to be asked or nobody answers, or else what there is."""
        if self.terms.offline or is_offline():
            return self._cached_or("offline was asked for, and no")
        if self.reference.is_fixed:
            found = self._cached()
            # What it names never changes, so there is nothing to ask; unless a program that needs less fetched it.
            if found is not None and (found.format == "gguf" or (found.folder / TOKENIZER).is_file()):
                return found
        try:
            return self._list()
        except TransientSourceError as error:
            found = self._cached()
            if found is None:
                raise
            emit("source.warning", model=self.model, message=f"the cached copy is used: {error.message}")
            return found

    def _cached(self) -> ModelFiles | None:
        """Return the files in the cache if they are all there, without asking the network."""
        try:
            return self._cached_or("no")
        except SourceError:
            return None

    def _cached_or(self, reason: str) -> ModelFiles:
        """Return the files in the cache; raise SourceError, with `reason`, if they are not all there."""
        revision = self.reference.revision
        hint = "Go online once to fetch it (unset HF_HUB_OFFLINE, `offline: false`)."
        commit = self.cache.commit_of(revision)
        if commit is None or not self.cache.snapshot(commit).is_dir():
            at = f" at {revision!r}" if revision else ""
            raise SourceError(f"{self.model}{at}: {reason} copy is in the cache {self.cache.root}", hint=hint)
        try:
            return self._in_snapshot(commit)
        except (CheckpointError, OSError) as error:
            raise SourceError(f"{self.model}: {reason} whole copy is in the cache: {error}", hint=hint) from error

    def _in_snapshot(self, commit: str) -> ModelFiles:
        return from_folder(
            self.cache.snapshot(commit),
            name=self.model,
            origin=self.source.origin(self.reference),
            revision=commit,
            variant=self.reference.variant,
            prefers_q4_k_m=True,
        )

    # -- from its place ------------------------------------------------------------------------------------------------

    def _list(self) -> Listing:
        """Ask which files there are; once only when nobody is there and a copy is cached."""

        def retry_if(error: BaseException) -> bool:
            return is_transient(error) and not (isinstance(error, NoRouteError) and self._cached() is not None)

        action = f"list the files of {self.model}"

        def ask() -> Listing:
            with _translated(action):
                return self.source.list_files(self.reference)

        return self._attempt(action, ask, retry_if)

    def _download(self, listing: Listing) -> ModelFiles:
        """Fetch what is needed of `listing` and is not in the cache; return all of it."""
        names = self._needed(listing)
        files = [listing.files[name] for name in names]
        self._adopt(file for file in files if self.cache.content(listing.commit, file) is None)
        missing = self.cache.bytes_missing(listing.commit, files)
        self._need_room(missing)
        if missing:
            with timed("source.download", model=self.model, files=len(files), bytes=missing):
                for file in files:
                    self._bring(listing, file)
        try:
            self.cache.publish(listing, names, self.reference.revision)
        except OSError as error:
            raise self._unwritable(error) from error
        return self._in_snapshot(listing.commit)

    def _adopt(self, files: Iterable[RemoteFile]) -> None:
        """Take what other programs on this machine have fetched already."""
        for file in files:
            copy = self.source.copy_of(self.reference, file)
            if copy is not None and adopt(self.cache, file, copy):
                emit("source.adopted", model=self.model, file=file.name, bytes=file.size, place=str(copy))

    def _headers(self, listing: Listing) -> Headers:
        """Fetch the small files that say what the model is; of the weights return where to read their beginnings."""
        needed = self._needed(listing)
        weights = [listing.files[name] for name in needed if name.endswith(SUFFIXES)]
        small = [listing.files[name] for name in (CONFIG, GENERATION, INDEX) if name in needed]
        for file in small:
            if file.size > LARGEST_INDEX:
                raise CheckpointError(f"{file.name} has {file.size} bytes, more than is believed", file=file.name)
            self._bring(listing, file)
        snapshot = self.cache.snapshot(listing.commit)
        try:
            self.cache.give_names(listing, [file.name for file in small])
        except OSError as error:
            raise self._unwritable(error) from error
        places = tuple(snapshot / file.name for file in weights)
        files = ModelFiles(self.model, snapshot, places, self.source.origin(self.reference), listing.commit)
        missing = [file for file in weights if self.cache.content(listing.commit, file) != snapshot / file.name]
        remote = {snapshot / file.name: RemoteWeights(file, self._range_reader(file)) for file in missing}
        with timed("source.headers", model=self.model, files=len(missing)) as more:
            read_beginnings(remote.values())
            more["bytes"] = sum(one.arrived for one in remote.values())
        to_fetch = self.cache.bytes_missing(listing.commit, (listing.files[name] for name in needed))
        return Headers(files, remote, sum(file.size for file in weights), to_fetch)

    def _needed(self, listing: Listing) -> list[str]:
        """Return the names of the files that are needed, weights last."""
        place = self.source.place(self.reference)

        def index() -> bytes:
            self._need_room(listing.files[INDEX].size)
            return read_index(self._bring(listing, listing.files[INDEX]))

        weights = choose_weights(
            listing.files,
            place=place,
            read_index=index,
            variant=self.reference.variant,
            prefers_q4_k_m=True,
        )
        for name in weights:
            check_plain_name(name, place, "it lists")
        if weights[0].endswith(".gguf"):
            emit("source.choice", model=self.model, file=weights[0])
        elif CONFIG not in listing.files:
            raise CheckpointError(f"{CONFIG} is missing", file=place, hint="Choose a model that has it.")
        companions = [name for name in COMPANIONS if name in listing.files]
        is_indexed = INDEX in listing.files and weights[0] != SINGLE and not weights[0].endswith(".gguf")
        return companions + ([INDEX] if is_indexed else []) + list(weights)

    def _bring(self, listing: Listing, file: RemoteFile) -> Path:
        action = f"fetch {file.name} of {self.model}"

        def blocks(start: int, stop: int) -> Generator[bytes, None, None]:
            return self._blocks(action, file, start, stop)

        while (content := self.cache.content(listing.commit, file)) is None:
            before = self.cache.bytes_arrived(file)
            try:
                self._attempt(
                    action,
                    lambda: bring(self.cache, listing.commit, file, blocks),
                    about={"file": file.name, "bytes": file.size},
                )
            except TransientSourceError:
                if self.cache.bytes_arrived(file) - before < ENOUGH_PROGRESS:
                    raise
        return content

    def _range_reader(self, file: RemoteFile) -> Callable[[int, int], bytes]:
        action = f"read the header of {file.name} of {self.model}"

        def once(start: int, stop: int) -> bytes:
            found = bytearray()
            with closing(self._blocks(action, file, start, stop)) as blocks:
                for block in blocks:
                    found += block
                    if len(found) >= stop - start:
                        return bytes(found[: stop - start])
            raise TransientSourceError(f"{file.name}: {len(found)} of {stop - start} bytes arrived")

        def read(start: int, length: int) -> bytes:
            return self._attempt(action, lambda: once(start, start + length), about={"file": file.name})

        return read

    def _blocks(self, action: str, file: RemoteFile, start: int, stop: int) -> Generator[bytes, None, None]:
        """Yield what the source yields; what it raises is translated here, where the disk has no part in it."""
        with _translated(action):
            yield from self.source.read(file, start, stop)

    def _attempt(
        self,
        action: str,
        function: Callable[[], Result],
        retry_if: Callable[[BaseException], bool] = is_transient,
        about: Mapping[str, Any] | None = None,
    ) -> Result:
        policy = self.terms.retry
        return retry_call(
            function,
            max_attempts=policy.max_attempts if policy else 3,
            first_wait=policy.first_wait if policy else 1.0,
            max_wait=policy.max_wait if policy else 30.0,
            retry_if=retry_if,
            action=action,
            event="source.retry",
            about={"model": self.model, "phase": "resolve", **(about or {})},
        )

    def _need_room(self, needed: int) -> None:
        free = free_bytes(self.cache.root)
        if needed > free:
            raise ResourceError(
                f"{self.model} needs {format_size(needed)} more on disk; in {self.cache.root} {format_size(free)} are"
                " free",
                needed=needed,
                allowed=free,
                hint=f"Make room, or set {self.cache.knob} to a folder on a larger disk.",
            )

    def _unwritable(self, error: OSError) -> SourceError:
        hint = f"Set {self.cache.knob} to a folder that can."
        return SourceError(f"{self.cache.folder} cannot be written: {error}", hint=hint)


def is_offline() -> bool:
    """Tell whether the Hub's own variables say to ask no network; every source keeps to them."""
    said = (os.environ.get(name, "") for name in OFFLINE_VARIABLES)
    return any(value.strip().upper() in {"1", "ON", "YES", "TRUE"} for value in said)


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """Make errors of ours of whatever a source raises."""
    try:
        yield
    except LoadstoneError:
        raise
    except Exception as error:
        text = f"Could not {action}: {type(error).__name__}: {error}"
        if is_transient(error):
            raise TransientSourceError(text, retry_after=wait_asked_for(error)) from error
        raise SourceError(text) from error
