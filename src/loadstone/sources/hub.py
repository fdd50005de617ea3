"""Models on a Hub, or on a mirror of it (HF_ENDPOINT): how it is asked, and what its refusals mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from loadstone.errors import ConfigurationError, SourceError, TransientSourceError

from .base import COMMIT, Listing, Reference, RemoteFile, Terms
from .cache import FileCache, hub_root
from .http import Site, retry_after
from .source import RemoteSource

ENDPOINT = "https://huggingface.co"
LARGEST_LISTING = 64 * 2**20
"""Bytes; the listing of a repository with a hundred thousand files is smaller."""

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class Hub(RemoteSource):
    """The Hub: names are `org/name[:variant][@revision]`, also without `hub:` before them."""

    name = "hub"
    summary = "Hugging Face's Hub or a mirror of it: org/name"

    def reference(self, model: str, terms: Terms) -> Reference:
        found = super().reference(model, terms)
        check_id(model, found.path)
        return Reference(found.path, found.path, found.revision, found.variant)

    def cache(self, reference: Reference) -> FileCache:
        return FileCache(hub_root(), "--".join(["models", *reference.path.split("/")]))

    def origin(self, reference: Reference) -> str:
        where = endpoint()
        return f"Hub: {reference.path}" + ("" if where == ENDPOINT else f" at {where}")

    def place(self, reference: Reference) -> str:
        return f"{endpoint()}/{reference.path}"

    def list_files(self, reference: Reference) -> Listing:
        at = f"/revision/{quote(reference.revision, safe='')}" if reference.revision else ""
        what = f"{reference.path}@{reference.revision}" if reference.revision else reference.path
        site, page = _site(what, self.place(reference)), self.place(reference)
        about = site.read_json(f"{endpoint()}/api/models/{reference.path}{at}?blobs=true", LARGEST_LISTING)
        commit = about.get("sha")
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise site.unlike("it does not say at which commit the repository is")
        try:
            return Listing.of((_file(one, f"{page}/resolve/{commit}") for one in about.get("siblings") or ()), commit)
        except (KeyError, TypeError, AttributeError) as error:
            raise site.unlike("it does not list size and hash of every file") from error

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        page = file.place.partition("/resolve/")[0]
        what = f"{page.removeprefix(endpoint()).strip('/')}/{file.name}"
        return _site(what, page).read(file.place, file.name, start, stop, file.size)


def is_hub_name(model: str) -> bool:
    """Tell whether a name without a prefix is one of the Hub."""
    return re.fullmatch(rf"{_ID.pattern}(:[\w.-]+)?(@.+)?", model, re.ASCII) is not None


def check_id(model: str, path: str) -> None:
    """Raise ConfigurationError unless a repository is named `org/name`."""
    if not _ID.fullmatch(path):
        raise ConfigurationError(f"{model!r}: a repository is called `org/name`, and not {path!r}", key="base_model")


def endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT as it is now, or the Hub's own."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def _file(listed: Any, folder: str) -> RemoteFile:
    """Return a file as the Hub's JSON has it: of a large one the SHA-256, of a small one git's name of its blob."""
    name, large = str(listed["rfilename"]), listed.get("lfs")
    size = large["size"] if large else listed["size"]
    identity = large["sha256"] if large else listed["blobId"]
    return RemoteFile(name, size, str(identity), f"{folder}/{quote(name)}")


def _site(what: str, page: str) -> Site:
    """Return the Hub as it is asked for `what`, of the repository whose page is there."""

    def explain(status: int, headers: Mapping[str, str], answer: str) -> SourceError | None:
        code = headers.get("X-Error-Code", "")
        if status == 429:
            hint = "Logging in with `hf auth login` allows more requests."
            return TransientSourceError(f"{what}: {answer}", retry_after=retry_after(headers), hint=hint)
        if code == "GatedRepo":
            return SourceError(
                f"{what} is gated: {answer}",
                hint=f"Accept its licence at {page}, then `hf auth login` or set HF_TOKEN.",
            )
        if code == "RevisionNotFound":
            hint = f"See {page}/commits/main."
            return SourceError(f"{what}: there is no such revision: {answer}", hint=hint)
        return None

    return Site(
        endpoint(),
        what,
        setting="HF_ENDPOINT",
        not_there="Check the name, and HF_ENDPOINT if it is set.",
        not_allowed="Check the name. If it is private or gated, accept its licence on its page, then"
        " `hf auth login` or set HF_TOKEN; a token that has run out is refused like this too.",
        headers=_headers,
        explain=explain,
    )


def _headers() -> Mapping[str, str]:
    from . import _huggingface

    return _huggingface.headers()
