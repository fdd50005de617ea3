"""Folders of plain files elsewhere: what is in them, and with which content, is said by a list of checksums.

    SHA256SUMS          in the folder, as `sha256sum * > SHA256SUMS` writes it: the files, each with its SHA-256
    NAME.gguf.sha256    beside a single file, as `sha256sum NAME.gguf` writes it, where there is no list
    …#sha256=HEX        at the end of the name: the SHA-256 of the list, or of a single file, said by the user

What has no checksum is refused: nothing else would tell a file that is cut off or altered from a whole one.
"""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from loadstone.errors import CheckpointError, ConfigurationError, SourceError

from .base import Listing, Reference, RemoteFile, Terms
from .choose import COMPANIONS, INDEX
from .local import SUFFIXES, mention_unused
from .source import RemoteSource

SUMS = "SHA256SUMS"
SIDECAR = ".sha256"
LARGEST_SUMS = 2**20
"""Bytes; a list of checksums of ten thousand files is smaller."""

AT_ONCE = 8  # requests for sizes
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_PIN = re.compile(r"sha256=([0-9a-fA-F]{64})")


class FolderSource(RemoteSource):
    """A source of names like `scheme://host/folder/` and `scheme://host/folder/model.gguf`.

    Whoever derives from it says how a place is read and how large it is; places are names without `#…`.
    """

    @abstractmethod
    def read_all(self, place: str, most: int) -> bytes | None:
        """Return what is at `place`, None where nothing is; raise SourceError where it is more than `most` bytes."""

    @abstractmethod
    def size_of(self, place: str) -> int:
        """Return the bytes of the file at `place`; raise SourceError where there is none."""

    def place_of(self, folder: str, name: str) -> str:
        """Return the place of the file `name` in `folder`, which ends with a slash."""
        return folder + name

    def reference(self, model: str, terms: Terms) -> Reference:
        """Return what a name means; its revision is the checksum that the name ends with, if it does."""
        place, _, pin = model.partition("#")
        match = _PIN.fullmatch(pin)
        if pin and match is None:
            raise ConfigurationError(
                f"{model!r} ends with {pin!r}; what may stand there is sha256= and 64 hexadecimal digits",
                key="base_model",
            )
        self.check(place)
        mention_unused(terms, model)
        return Reference(place.rstrip("/"), place.rstrip("/"), match[1].lower() if match else None)

    def check(self, place: str) -> None:
        """Raise ConfigurationError unless `place` can be meant, and may be remembered and told to others."""
        rest = place.removeprefix(f"{self.name}://")
        if rest == place or not rest.strip("/") or re.search(r"[?\\\x00-\x20\x7f]|(^|/)\.\.?(/|$)", rest):
            shown = re.sub(r"//[^/]*@", "//…@", place.partition("?")[0])
            raise ConfigurationError(
                f"{shown!r} is no name of a folder: write {self.name}://, a host or bucket and a path, without `?`,"
                " spaces, and dots that lead elsewhere",
                key="base_model",
                hint="Names are remembered and logged, so a signed link is none.",
            )
        if "@" in rest.partition("/")[0]:
            raise ConfigurationError(
                f"a name and password in {self.name}://… are not used, since names are remembered and logged",
                key="base_model",
            )

    def list_files(self, reference: Reference) -> Listing:
        folder, single = _parted(reference.path)
        sums = self._sums_of_file(reference, folder, single) if single else self._sums_of_folder(reference, folder)
        places = {name: self.place_of(folder, name) for name in sums}
        with ThreadPoolExecutor(AT_ONCE, "loadstone-sizes") as pool:
            sizes = pool.map(self.size_of, places.values())
            files = [
                RemoteFile(name, size, sums[name], place)
                for (name, place), size in zip(places.items(), sizes, strict=True)
            ]
        return Listing.of(files)

    def _sums_of_folder(self, reference: Reference, folder: str) -> Mapping[str, str]:
        """Return the checksums of those files in a folder that a model may need."""
        place = self.place_of(folder, SUMS)
        listed = self.read_all(place, LARGEST_SUMS)
        if listed is None:
            raise SourceError(
                f"{reference.path}/ has no {SUMS}, and so nothing to tell whole files from damaged ones",
                hint=f"Make it in the folder: sha256sum * > {SUMS}. Or name a single .gguf file that has a"
                f" {SIDECAR} beside it.",
            )
        if reference.revision not in (None, hashlib.sha256(listed).hexdigest()):
            raise SourceError(f"{place} is not the list whose SHA-256 the name says", hint="Ask whoever told you it.")
        return {name: digest for name, digest in parse_sums(listed, place).items() if _may_be_needed(name)}

    def _sums_of_file(self, reference: Reference, folder: str, name: str) -> Mapping[str, str]:
        if reference.revision is not None:
            return {name: reference.revision}
        for beside in (name + SIDECAR, SUMS):
            place = self.place_of(folder, beside)
            listed = self.read_all(place, LARGEST_SUMS)
            if listed is None:
                continue
            found = parse_sums(listed, place)
            if name in found:
                return {name: found[name]}
        raise SourceError(
            f"{reference.path} has no checksum, in {name}{SIDECAR} or {SUMS} beside it",
            hint=f"Make one there: sha256sum {name} > {name}{SIDECAR}. Or write what it must be after the name:"
            " #sha256=…",
        )


def parse_sums(listed: bytes, place: str) -> dict[str, str]:
    """Return the checksums by name in a list as `sha256sum` writes it; raise CheckpointError where it is none."""
    found: dict[str, str] = {}
    try:
        lines = listed.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the list of checksums is not text: {error}", file=place) from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            raise CheckpointError(
                f"line {number} is not a SHA-256 and a name: {line[:100]!r}",
                file=place,
                hint="Write it with sha256sum.",
            )
        digest, name = match[1].lower(), match[2]
        if found.setdefault(name, digest) != digest:
            raise CheckpointError(f"{name!r} is listed twice, with different checksums", file=place)
    return found


def _parted(path: str) -> tuple[str, str | None]:
    """Return the folder of a path, with a slash at its end, and the file where it names one."""
    folder, _, name = path.rpartition("/")
    return (f"{folder}/", name) if name.endswith(".gguf") else (f"{path}/", None)


def _may_be_needed(name: str) -> bool:
    return "/" not in name and (name in (*COMPANIONS, INDEX) or name.endswith(SUFFIXES))
