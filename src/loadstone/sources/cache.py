"""Fetched files on disk, laid out as the Hub's own cache is, which every program that uses the Hub shares.

    ROOT/NAME/                       one model: models--org--name in the Hub's cache
    ├── blobs/IDENTITY               content, named by what it is; IDENTITY.incomplete while it arrives
    ├── snapshots/COMMIT/NAME        links to blobs: the files of one commit by name
    └── refs/REVISION                the commit that a branch or tag was last seen at

Here a ref is written last, so that what a ref leads to is whole unless another program put it there. Knows no
network and needs no library of the Hub.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loadstone.folders import cache_folder

from .base import COMMIT, Listing, ModelFiles, RemoteFile

DEFAULT_REVISION = "main"


def hub_root() -> Path:
    """Return the folder of the Hub's cache, by the Hub's own environment variables, read now."""
    environment = os.environ
    base = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = environment.get("HF_HOME") or os.path.join(base, "huggingface")
    named = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    folder = named or os.path.join(home, "hub")
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(folder))))


def downloads_folder() -> Path:
    """Return the folder that files are fetched into by every source but the Hub, whose cache is its own."""
    return cache_folder() / "downloads"


@dataclass(frozen=True)
class FileCache:
    """The folder `name` in `root` that has the files of one model; the setting `knob` moves the root elsewhere."""

    root: Path
    name: str
    knob: str = "HF_HOME"

    @property
    def folder(self) -> Path:
        """Where the model's files are kept."""
        return self.root / self.name

    def blob(self, file: RemoteFile) -> Path:
        """Return where the content of `file` is kept once it is whole."""
        return self.folder / "blobs" / file.identity

    def partial(self, file: RemoteFile) -> Path:
        """Return where the content of `file` is kept while it arrives."""
        return self.folder / "blobs" / f"{file.identity}.incomplete"

    def lock(self, file: RemoteFile) -> Path:
        """Return the lock that every program holds while it fetches this content."""
        return self.root / ".locks" / self.name / f"{file.identity}.lock"

    def snapshot(self, commit: str) -> Path:
        """Return the folder with the files of `commit` by name."""
        return self.folder / "snapshots" / commit

    def commit_of(self, revision: str | None) -> str | None:
        """Return the commit that `revision` was last seen at; None when it never was."""
        if revision is not None and COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / (revision or DEFAULT_REVISION)).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def content(self, commit: str, file: RemoteFile) -> Path | None:
        """Return a path with the whole content of `file`, None when there is none of the right size."""
        for path in (self.snapshot(commit) / file.name, self.blob(file)):
            with contextlib.suppress(OSError):
                if path.stat().st_size == file.size:
                    return path
        return None

    def bytes_missing(self, commit: str, files: Iterable[RemoteFile]) -> int:
        """Return how many bytes of `files` are still to come."""
        missing = {one.identity: one for one in files if self.content(commit, one) is None}
        return sum(max(0, one.size - self.bytes_arrived(one)) for one in missing.values())

    def bytes_arrived(self, file: RemoteFile) -> int:
        """Return how many bytes of an unfinished `file` are here."""
        try:
            return self.partial(file).stat().st_size
        except OSError:
            return 0

    def publish(self, listing: Listing, names: Iterable[str], revision: str | None) -> None:
        """Give the blobs of `names` their names in the snapshot, then say where `revision` leads."""
        self.give_names(listing, names)
        wanted = revision or DEFAULT_REVISION
        if wanted != listing.commit and self.commit_of(revision) != listing.commit:
            _write(self.folder / "refs" / wanted, listing.commit)

    def give_names(self, listing: Listing, names: Iterable[str]) -> None:
        """Give the blobs of `names` their names in the snapshot; nothing says that it is whole."""
        snapshot = self.snapshot(listing.commit)
        for name in names:
            file = listing.files[name]
            if self.content(listing.commit, file) != snapshot / name:
                _link(self.blob(file), snapshot / name)

    def remove(self, commit: str, names: Iterable[str]) -> int:
        """Remove files of a snapshot, and their content unless another snapshot has it too; return the bytes freed."""
        freed = 0
        for name in names:
            pointer = self.snapshot(commit) / name
            blob = pointer.resolve()
            pointer.unlink(missing_ok=True)
            others = (other for other in self.folder.glob("snapshots/*/**/*") if other.is_symlink())
            if blob.is_file() and blob.parent == self.folder.resolve() / "blobs":
                if any(other.resolve() == blob for other in others):
                    continue
                freed += blob.stat().st_size
                blob.unlink()
        return freed

    def adopt(self, file: RemoteFile, path: Path) -> None:
        """Have what another program has at `path`, too; raise OSError where it is on another disk.

        A hard link: whatever takes the file's place there later, this content stays.
        """
        blob = self.blob(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        aside = blob.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
        os.link(path.resolve(), aside)
        os.replace(aside, blob)


@dataclass(frozen=True)
class FetchedWeights:
    """The weights of a model that were fetched into a cache."""

    cache: FileCache
    commit: str
    names: tuple[str, ...]

    def remove(self) -> int:
        """Remove them, but for what another revision has too; return the bytes freed. Other files stay."""
        return self.cache.remove(self.commit, self.names)


def fetched_weights(files: ModelFiles) -> FetchedWeights | None:
    """Return a model's weights as a cache of ours or the Hub's has them, or None when they were not fetched."""
    model = files.folder.parent.parent
    if files.revision is None or model.parent not in (hub_root(), downloads_folder()):
        return None
    cache = FileCache(model.parent, model.name)
    is_there = files.folder == cache.snapshot(files.revision)
    return FetchedWeights(cache, files.revision, tuple(file.name for file in files.weights)) if is_there else None


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where `folder` is, or will be."""
    while not os.path.exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _link(blob: Path, pointer: Path) -> None:
    pointer.parent.mkdir(parents=True, exist_ok=True)
    aside = pointer.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        # No symbolic links here: Windows without developer mode, some network disks.
        try:
            os.link(blob, aside)
        except OSError:
            shutil.copyfile(blob, aside)
    os.replace(aside, pointer)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    aside.write_text(text, "ascii")
    os.replace(aside, file)
