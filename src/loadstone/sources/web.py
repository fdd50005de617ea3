"""Folders of plain files on web servers, with checksums: `https://host/folder/`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

from loadstone.errors import ConfigurationError

from .base import Reference, RemoteFile, Terms
from .folder import FolderSource
from .http import NotThereError, Site


class Https(FolderSource):
    """A folder, or a single .gguf file, on a web server. No name and password are sent."""

    name = "https"
    summary = "a folder with SHA256SUMS on a web server: https://host/folder/"

    def check(self, place: str) -> None:
        super().check(place)
        try:
            _ = urlsplit(place).port
        except ValueError as error:
            raise ConfigurationError(f"{place!r} is no address: {error}", key="base_model") from error

    def place_of(self, folder: str, name: str) -> str:
        return folder + quote(name)

    def read_all(self, place: str, most: int) -> bytes | None:
        try:
            return _site(place).read_all(place, most)
        except NotThereError:
            return None

    def size_of(self, place: str) -> int:
        return _site(place).size_of(place)

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        return _site(file.place).read(file.place, file.name, start, stop, file.size)


class Http(Https):
    """The same without encryption: from this machine itself, or with a checksum that the user said."""

    name = "http"
    summary = "the same from this machine, or with #sha256=… after the name: http://host/folder/"

    def reference(self, model: str, terms: Terms) -> Reference:
        found = super().reference(model, terms)
        if found.revision is None and not _is_this_machine(urlsplit(found.path).hostname or ""):
            raise ConfigurationError(
                f"{found.path}: what comes over http may be altered on its way, its checksums too",
                key="base_model",
                hint="Use https, or write the checksum that you trust after the name: #sha256=… (of SHA256SUMS, or of a"
                " single .gguf file).",
            )
        return found


def _site(place: str) -> Site:
    parts = urlsplit(place)
    return Site(
        f"{parts.scheme}://{parts.netloc}",
        place,
        setting="the name",
        not_there="Check the name: each of the files that its list names must lie in the folder.",
        not_allowed="Loadstone logs in to no web server. Fetch the folder in another way, and name it.",
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
