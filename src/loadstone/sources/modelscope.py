"""Models on ModelScope: how its file interface is asked, and what its refusals mean.

Its library (modelscope-hub, which modelscope brings since 1.38) is not needed. Where it is installed, its login and
what it has fetched before are used; see `_modelscope`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from .base import Listing, Reference, RemoteFile, Terms
from .http import Site
from .hub import LARGEST_LISTING, check_id
from .source import RemoteSource

ENDPOINT = "https://modelscope.cn"
DEFAULT_REVISION = "master"


class ModelScope(RemoteSource):
    """ModelScope: names are `modelscope:org/name[:variant][@revision]`."""

    name = "modelscope"
    summary = "ModelScope: modelscope:org/name"

    def reference(self, model: str, terms: Terms) -> Reference:
        found = super().reference(model, terms)
        check_id(model, found.path)
        return found

    def place(self, reference: Reference) -> str:
        return f"{endpoint()}/models/{reference.path}"

    def origin(self, reference: Reference) -> str:
        where = endpoint()
        return f"ModelScope: {reference.path}" + ("" if where == ENDPOINT else f" at {where}")

    def list_files(self, reference: Reference) -> Listing:
        # Only what lies in the folder itself is asked for: that is all that is needed, and longer lists are cut off.
        revision = reference.revision or DEFAULT_REVISION
        folder = f"{endpoint()}/api/v1/models/{reference.path}/repo"
        site = _site(f"{reference.path}@{revision}" if reference.revision else reference.path)
        answer = site.read_json(
            f"{folder}/files?{urlencode({'Revision': revision, 'Recursive': 'False'})}", LARGEST_LISTING
        )
        if answer.get("Code") != 200:
            raise site.unlike(f"{answer.get('Code')}: {str(answer.get('Message'))[:200]}")
        try:
            listed = [one for one in answer["Data"]["Files"] if one.get("Type") != "tree"]
            return Listing.of(_file(one, folder, revision) for one in listed)
        except (KeyError, TypeError, AttributeError) as error:
            raise site.unlike("it does not list name, size and hash of every file") from error

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        return _site(file.name).read(file.place, file.name, start, stop, file.size)

    def copy_of(self, reference: Reference, file: RemoteFile) -> Path | None:
        from . import _modelscope

        folder = _modelscope.fetched_folder(reference.path, reference.revision)
        return folder / file.name if folder is not None else None


def endpoint() -> str:
    """Return the address of ModelScope: MODELSCOPE_ENDPOINT as it is now, or its own."""
    said = os.environ.get("MODELSCOPE_ENDPOINT", "").strip().rstrip("/")
    if said and "://" not in said:
        return f"https://{said}"
    return said or ENDPOINT


def _file(listed: Any, folder: str, revision: str) -> RemoteFile:
    name = str(listed["Path"])
    place = f"{folder}?{urlencode({'Revision': revision, 'FilePath': name})}"
    return RemoteFile(name, listed["Size"], str(listed["Sha256"]).lower(), place)


def _site(what: str) -> Site:
    return Site(
        endpoint(),
        f"{what} at ModelScope",
        setting="MODELSCOPE_ENDPOINT",
        not_there="Check the name and the revision. A private model is hidden like this from who is not logged in.",
        not_allowed="If it is private or gated, ask for access on its page, then set MODELSCOPE_API_TOKEN, or log in"
        " with ModelScope's own library where that is installed.",
        headers=_headers,
    )


def _headers() -> Mapping[str, str]:
    from . import _huggingface, _modelscope

    found = {"User-Agent": _huggingface.user_agent()}
    token = os.environ.get("MODELSCOPE_API_TOKEN") or _modelscope.login()
    # Older parts of its interface read the cookie, newer ones the header; its own library sends both.
    return found | ({"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {})
