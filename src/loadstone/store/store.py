"""Finds entries, has them made by one process at a time, and removes those that are not needed.

The store may be missing, full, read-only or damaged: then a load goes on without it, and a warning says why.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loadstone.checkpoint import open_weights
from loadstone.checkpoint.digests import same_content
from loadstone.checkpoint.spec import ModelSpec
from loadstone.config import StoreConfig
from loadstone.folders import cache_folder
from loadstone.telemetry import emit
from loadstone.units import format_size

from .attached import Attached
from .draft import Draft
from .entry import MANIFEST, USED, DamagedError, Entry, Kind, size_of
from .known import KnownFiles, Look
from .light import LightModel, LightModels
from .locks import exclusive, is_free, open_alone
from .restart import verify_after_restart


class StoreUnavailableError(Exception):
    """The store cannot be written, or has no room; `str()` says why. A load goes on without it."""


class Store:
    """The store in `folder`; `max_size` is the most that its entries may take together, in bytes."""

    def __init__(self, folder: Path, *, max_size: int | None = None) -> None:
        self.folder = folder
        self.max_size = max_size
        self.light = LightModels(folder / "light")
        self._known = KnownFiles(folder / "known")

    # -- finding --------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all entries, the last used first; what has no manifest that can be read is left out."""
        found = []
        for folder in self._folders("entries"):
            with suppress(OSError, DamagedError):
                found.append(Entry.at(folder))
        return sorted(found, key=lambda entry: -entry.last_used)

    def unreadable(self) -> dict[Path, str]:
        """Return folders that stand among the entries and are none, with the reason."""
        found = {}
        for folder in self._folders("entries"):
            try:
                Entry.at(folder)
            except FileNotFoundError:
                found[folder] = "its manifest is missing"
            except DamagedError as error:
                found[folder] = str(error)
        return {folder: reason for folder, reason in found.items() if folder.exists()}  # none that just went

    def find(self, kind: Kind, spec: ModelSpec) -> Entry | None:
        """Return the entry for a checkpoint whose files are known; None when there is none, or they are not.

        Reads no weights.
        """
        digests = self.digests(spec)
        return None if digests is None else self._entry(kind.key(digests))

    def digests(self, spec: ModelSpec) -> dict[str, str] | None:
        """Return the digest of each tensor of a checkpoint, or None where its files would have to be read for it."""
        listed = {name: tensor.digest for name, tensor in spec.tensors.items() if tensor.digest is not None}
        return listed if len(listed) == len(spec.tensors) else self._known.digests(spec, Look.at(spec))

    def has(self, spec: ModelSpec, strategy: str) -> bool:
        """Tell whether there is an entry with the weights of a checkpoint kept by `strategy`, for any kind of device.

        Reads no weights and needs no torch, which knowing the form on this device would take.
        """
        digests = self.digests(spec)
        if digests is None:
            return False
        return any(one.manifest.strategy == strategy and one.manifest.source == digests for one in self.entries())

    def find_light(self, model: str, revision: str | None, strategy: str) -> LightModel | None:
        """Return the model of this name whose original weights were not kept, as long as its quantised ones are."""
        found = self.light.find(model, revision, strategy)
        return None if found is None or not (self.folder / "entries" / found.key / MANIFEST).is_file() else found

    def find_by_content(self, kind: Kind, spec: ModelSpec) -> Entry | None:
        """Return the entry for a checkpoint that may be anywhere and under any name, by reading its weights.

        Reads them all only when they are those of an entry, and then remembers the files.
        """
        alike = [entry for entry in self.entries() if entry.manifest.kind == kind.id]
        if not alike or self.digests(spec) is not None:
            return None
        look = Look.at(spec)
        with open_weights(spec) as weights:
            for entry in alike:
                if same_content(weights, entry.manifest.source):
                    self._known.remember(spec, look, entry.manifest.source)
                    return entry
        return None

    def _entry(self, key: str) -> Entry | None:
        folder = self.folder / "entries" / key
        try:
            return Entry.at(folder)
        except FileNotFoundError:
            if folder.exists():
                self.set_aside(folder, "its manifest is missing")
            return None
        except OSError as error:
            emit("store.warning", reason=f"an entry cannot be read: {error}", file=str(folder))
            return None
        except DamagedError as error:
            self.set_aside(folder, str(error))
            return None

    # -- using ----------------------------------------------------------------------------------------------------

    def attach(self, entry: Entry) -> Attached | None:
        """Return an entry's tensors, mapped; None when it turns out to be damaged, which sets it aside, or gone."""
        try:
            verify_after_restart(entry)
            attached = Attached(entry)
        except DamagedError as error:
            self.set_aside(entry.folder, str(error))
            return None
        except OSError as error:
            emit("store.warning", reason=f"an entry cannot be read: {error}", file=str(entry.folder))
            return None
        self.note_use(entry)
        return attached

    def note_use(self, entry: Entry) -> None:
        """Note that an entry was used now, where that can be written."""
        with suppress(OSError):
            os.utime(entry.folder / USED)

    def set_aside(self, folder: Path, reason: str) -> None:
        """Move a damaged entry out of the way, so that it is made again."""
        emit("store.warning", reason=f"a stored model is damaged and will be made again: {reason}", file=str(folder))
        aside = self.folder / "damaged" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        with suppress(OSError):
            aside.parent.mkdir(exist_ok=True)
            os.rename(folder, aside)

    # -- making ---------------------------------------------------------------------------------------------------

    @contextmanager
    def making(self, kind: Kind, *, about: str) -> Iterator[None]:
        """Be the one process that makes entries of this kind; others wait, and then find what was made.

        Raises StoreUnavailableError where no lock can be made.
        """
        with ExitStack() as held:
            with _unavailable("the store cannot be written"):
                locks = self.folder / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                held.enter_context(exclusive(locks / f"{kind.id}.lock", about=about))
            self._remove_left_drafts(kind.id)
            yield

    def draft(self, kind: Kind, *, most_tensors: int, nbytes: int) -> Draft:
        """Return a new draft; call it under `making`. Raises StoreUnavailableError when it has no room."""
        if self.max_size is not None and nbytes > self.max_size:
            raise StoreUnavailableError(
                f"{format_size(nbytes)} do not fit in the store's max_size of {format_size(self.max_size)}"
            )
        folder = self.folder / "drafts" / f"{kind.id}-{uuid.uuid4().hex[:8]}"
        with _unavailable("the store cannot be written"):
            return Draft(folder, most_tensors=most_tensors, nbytes=nbytes)

    def free_place(self, key: str) -> Path:
        """Return the folder for the entry with this key, having set aside what stands there and is none."""
        self._entry(key)
        return self.folder / "entries" / key

    def remember(self, spec: ModelSpec, look: Look, digests: dict[str, str]) -> None:
        """Remember what the files of a checkpoint hold, so that they need not be read to know it."""
        self._known.remember(spec, look, digests)

    def _remove_left_drafts(self, kind: str) -> None:
        """Remove what a process left that was ended while it made an entry of this kind; its lock is ours now."""
        for folder in self._folders("drafts"):
            if folder.name.startswith(kind):
                shutil.rmtree(folder, ignore_errors=True)

    def keep_within_limit(self, newest: Entry) -> None:
        """Remove what was used longest ago when all entries together take more than `max_size`."""
        if self.max_size is None:
            return
        try:
            self.prune(max_size=self.max_size, spare=newest)
        except OSError as error:  # what was made is there all the same
            emit("store.warning", reason=f"the store cannot be kept within its limit: {error}", file=str(self.folder))

    # -- keeping house --------------------------------------------------------------------------------------------

    def prune(
        self, *, max_size: int | None = None, older_than: float | None = None, spare: Entry | None = None
    ) -> list[Entry]:
        """Remove entries that were not used for `older_than` seconds, then those used longest ago until `max_size`.

        Entries in use stay, and so does `spare`. What is damaged, left over or of no use goes too. Returns what was
        removed.
        """
        self.sweep()
        removed = []
        kept = self.entries()
        total = sum(entry.nbytes for entry in kept)
        for entry in reversed(kept):
            is_old = older_than is not None and time.time() - entry.last_used > older_than
            is_too_much = max_size is not None and total > max_size
            if (is_old or is_too_much) and (spare is None or entry.folder != spare.folder):
                size = entry.nbytes
                if self.remove(entry):
                    total -= size
                    removed.append(entry)
        return removed

    def is_in_use(self, entry: Entry) -> bool:
        """Tell whether somebody has an entry in use now; on Windows this cannot be told, and is False."""
        with suppress(OSError):
            alone = open_alone(entry.folder / MANIFEST)
            if alone is None:
                return True
            alone.close()
        return False

    def remove(self, entry: Entry) -> bool:
        """Remove an entry; return False when somebody has it in use. Raises OSError when it cannot be removed."""
        try:
            alone = open_alone(entry.folder / MANIFEST)
        except FileNotFoundError:
            return True
        if alone is None:
            return False
        with alone:
            trash = self.folder / "drafts" / f"removed-{uuid.uuid4().hex[:8]}"
            trash.parent.mkdir(exist_ok=True)
            os.rename(entry.folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def sweep(self) -> int:
        """Remove damaged entries, drafts that nobody writes any more, and records of files that are gone.

        Returns the bytes that were freed.
        """
        locks = self.folder / "locks"
        drafts = self._folders("drafts")
        left = [draft for draft in drafts if is_free(locks / f"{draft.name.partition('-')[0]}.lock")] + self.damaged()
        before = sum(map(size_of, left))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        self._known.forget_missing()
        self.light.forget_without(entry.manifest.key for entry in self.entries())
        return before - sum(map(size_of, left))

    def damaged(self) -> list[Path]:
        """Return the folders of entries that were set aside."""
        return self._folders("damaged")

    def verify(self, entry: Entry) -> str | None:
        """Read all of an entry; return what is wrong with it, having set it aside, or None."""
        try:
            entry.verify()
        except DamagedError as error:
            self.set_aside(entry.folder, str(error))
            return str(error)
        return None

    def _folders(self, name: str) -> list[Path]:
        try:
            return sorted(folder for folder in (self.folder / name).iterdir() if folder.is_dir())
        except OSError:
            return []


def open_store(wish: StoreConfig) -> Store | None:
    """Return the store that the configuration asks for, or None when it asks for none; nothing is touched yet."""
    if not wish.enabled:
        return None
    folder = Path(os.path.abspath(os.path.expanduser(wish.folder))) if wish.folder else cache_folder() / "store"
    return Store(folder, max_size=wish.max_size)


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailableError(f"{what}: {error}") from error
