"""The one file that speaks to the Hub, and the only importer of huggingface_hub.

From that library come the session (proxies, certificates), the token, the listing and the locks. The bytes
are streamed here: its own download hides retries and sleeps, drops a partial file when it fails, and does not
compare content with its hash. Here one call is one attempt, a partial file is resumed, also by a later
process, and nothing that does not have its size and its hash is ever accepted.

The token is in request headers only; no error and no event carries a header or a query.
"""

from __future__ import annotations

import email.utils
import errno
import hashlib
import importlib.metadata
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    WeakFileLock,
    build_hf_headers,
)

from loadstone.errors import LoadstoneError, ResourceError, SourceError, TransientSourceError
from loadstone.telemetry import emit

from .base import Listing, NoRouteError, RemoteFile
from .hub_cache import COMMIT, HubCache

STALL_SECONDS = 30.0
"""A connection that brings nothing for so long is given up; how long a whole file takes is not limited."""

MOST_PASSED_OVER = 16 * 2**20
"""Bytes that are taken in for nothing, where a server sends a whole file and not the part that was asked for."""

EVENT_SECONDS = 0.1
_IDENTITY = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def list_files(repository: str, revision: str | None, endpoint: str) -> Listing:
    """Return the files of `repository` at `revision` (None is the default branch), with sizes and hashes."""
    with _translated(f"{repository}@{revision}" if revision else repository, repository, endpoint):
        info = HfApi(endpoint=endpoint, library_name="loadstone", library_version=_version()).model_info(
            repository, revision=revision, timeout=STALL_SECONDS, files_metadata=True
        )
    files: dict[str, RemoteFile] = {}
    for one in info.siblings or ():
        size = one.lfs.size if one.lfs else one.size
        identity = one.lfs.sha256 if one.lfs else one.blob_id
        if not isinstance(size, int) or size < 0 or not _IDENTITY.fullmatch(identity or ""):
            raise SourceError(f"{endpoint} does not list size and hash of {one.rfilename!r} in {repository}")
        files[one.rfilename] = RemoteFile(one.rfilename, size, str(identity))
    if not COMMIT.fullmatch(info.sha or ""):
        raise SourceError(f"{endpoint} does not say at which commit {repository} is")
    return Listing(str(info.sha), files)


def download(cache: HubCache, commit: str, file: RemoteFile, endpoint: str) -> None:
    """Bring the content of one file into the cache, going on where an earlier attempt stopped."""
    url = hf_hub_url(cache.repository, file.name, revision=commit, endpoint=endpoint)
    with _translated(f"{cache.repository}/{file.name}", cache.repository, endpoint):
        for path in (cache.partial(file), cache.lock(file)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(cache.lock(file)):
            if cache.content(commit, file) is not None:
                return  # another process was faster
            with _Incoming(cache.partial(file), file) as incoming:
                if incoming.arrived < file.size or not file.size:
                    _stream(url, incoming)
                incoming.check()
            os.replace(cache.partial(file), cache.blob(file))


def read_range(repository: str, commit: str, file: RemoteFile, endpoint: str, start: int, length: int) -> bytes:
    """Return bytes [start, start + length) of a file, all of which it has; one attempt.

    Of a server that sends the whole file instead, what comes before is passed over and the connection is closed as
    soon as the bytes are here; where more than MOST_PASSED_OVER come before, it is not read.
    """
    url = hf_hub_url(repository, file.name, revision=commit, endpoint=endpoint)
    with _translated(f"{repository}/{file.name}", repository, endpoint):
        headers = _headers() | {"Range": f"bytes={start}-{start + length - 1}"}
        with get_session().stream("GET", url, headers=headers, timeout=STALL_SECONDS) as response:
            return _part(response, file, start, length)


def _part(response: Any, file: RemoteFile, start: int, length: int) -> bytes:
    """Return the wanted bytes of a response, which has them at its beginning, or later where it is the whole file."""
    if response.status_code not in (200, 206):
        raise _Refused(response)
    if response.status_code == 206 and _range_start(response.headers) != start:
        raise TransientSourceError(f"{file.name}: another part arrived than was asked for")
    passed_over = start if response.status_code == 200 else 0
    if passed_over > MOST_PASSED_OVER:
        raise SourceError(f"{file.name}: the server sends no parts of files", hint="Fetch the model with `pull`.")
    found = bytearray()
    for block in response.iter_bytes():
        found += block
        if len(found) >= passed_over + length:
            return bytes(found[passed_over : passed_over + length])
    raise TransientSourceError(f"{file.name}: {len(found)} of {passed_over + length} bytes arrived")


class _Incoming:
    """A file on its way: what has arrived of it on disk, and the hash of that."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self.file = file
        self.arrived = 0
        self._told = 0.0
        self._stream = path.open("a+b")
        self._digest = _digest(file)
        self._stream.seek(0)
        while block := self._stream.read(2**20):
            self._count(block)
        if self.arrived > file.size:
            self.discard()

    def __enter__(self) -> _Incoming:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()  # what has arrived is kept, for the next attempt

    def discard(self) -> None:
        """Forget what has arrived."""
        self._stream.truncate(0)
        self._stream.seek(0)
        self.arrived = 0
        self._digest = _digest(self.file)

    def add(self, block: bytes) -> None:
        """Append what just arrived."""
        if self.arrived + len(block) > self.file.size:
            raise self.damaged("is longer than")
        self._stream.write(block)
        self._count(block)
        self.tell()

    def check(self) -> None:
        """Raise TransientSourceError, and forget all of it, unless size and hash are right."""
        if self.arrived != self.file.size:
            raise self.damaged(f"ended after {self.arrived} of")
        if self._digest.hexdigest() != self.file.identity:
            raise self.damaged("does not have the hash of")
        self.tell(is_last=True)

    def damaged(self, how: str) -> TransientSourceError:
        """Return the error for content that is not the file's, having forgotten it."""
        self.discard()
        return TransientSourceError(
            f"{self.file.name}: what arrived {how} the {self.file.size} bytes the Hub lists; it is discarded",
            hint="If it happens again, a proxy or mirror between here and the Hub is altering files.",
        )

    def tell(self, is_last: bool = False) -> None:
        """Emit how far it is, at most ten times a second."""
        now = time.monotonic()
        if is_last or now - self._told >= EVENT_SECONDS:
            self._told = now
            emit("download.progress", file=self.file.name, done=self.arrived, total=self.file.size)

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.arrived += len(block)


def _digest(file: RemoteFile) -> Any:
    if len(file.identity) == 64:
        return hashlib.sha256()
    # A git blob is hashed with its kind and size before it.
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _stream(url: str, incoming: _Incoming) -> None:
    headers = _headers()
    if incoming.arrived:
        headers["Range"] = f"bytes={incoming.arrived}-"
    with get_session().stream("GET", url, headers=headers, timeout=STALL_SECONDS) as response:
        if response.status_code == 416:
            raise incoming.damaged("cannot be the beginning of")
        if response.status_code not in (200, 206):
            raise _Refused(response)
        if response.status_code == 200:
            incoming.discard()  # the server sends the whole file, asked for a part or not
        elif _range_start(response.headers) != incoming.arrived:
            raise incoming.damaged("is another part than was asked for of")
        for block in response.iter_bytes():
            incoming.add(block)


def _headers() -> dict[str, str]:
    headers: dict[str, str] = build_hf_headers(library_name="loadstone", library_version=_version())
    headers["Accept-Encoding"] = "identity"  # a range of a compressed body would be of other bytes
    return headers


def _range_start(headers: Mapping[str, str]) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


class _Refused(Exception):
    """A response that is a refusal; `_translated` says what it means."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response


@contextmanager
def _translated(what: str, repository: str, endpoint: str) -> Iterator[None]:
    """Turn what HTTP, the disk and the library raise into this library's errors, keeping the cause."""
    try:
        yield
    except LoadstoneError:
        raise
    except (HfHubHTTPError, _Refused) as error:
        raise _refusal(error.response, what, repository, endpoint) from error
    except OfflineModeIsEnabled as error:
        raise SourceError(
            f"{what}: HF_HUB_OFFLINE was set when this process began", hint="Unset it and start again."
        ) from error
    except Exception as error:
        raise _failure(error, what, endpoint) from error


def _failure(error: Exception, what: str, endpoint: str) -> LoadstoneError:
    """Return what an error means that is not an answer of the Hub."""
    # By name: the library speaks through httpx in its version 1 and httpx2 since; the names are the same.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "ConnectError" in kinds and "CERTIFICATE" in str(error).upper():
        return SourceError(
            f"{what}: the certificate of {endpoint} is not trusted: {error}",
            hint="Behind a proxy that opens TLS, set SSL_CERT_FILE to its certificate.",
        )
    if kinds & {"ConnectError", "ConnectTimeout", "ProxyError"}:
        return NoRouteError(
            f"{what}: there is no route to {endpoint}: {error}",
            hint="Check the connection, HTTPS_PROXY and HF_ENDPOINT, or name a model on this machine.",
        )
    if kinds & {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError"}:
        return TransientSourceError(
            f"{what}: the connection to {endpoint} broke: {type(error).__name__}: {error}",
            hint="Try again; what has arrived is kept.",
        )
    if "HTTPError" in kinds or "InvalidURL" in kinds:
        return SourceError(f"{what}: {endpoint} cannot be asked: {error}", hint="Check HF_ENDPOINT.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{what}: the disk is full ({error.filename or 'the cache of the Hub'})",
            hint="Make room, or set HF_HOME to a folder on a larger disk; what has arrived is kept.",
        )
    if isinstance(error, OSError):
        return SourceError(f"{what}: the cache of the Hub cannot be written: {error}", hint="Check HF_HOME.")
    return SourceError(
        f"{what}: {endpoint} did not answer as a Hub does: {type(error).__name__}: {error}",
        hint="Check HF_ENDPOINT; a page that asks to log in to a network answers like this too.",
    )


def _refusal(response: Any, what: str, repository: str, endpoint: str) -> SourceError:
    """Return what a status of 400 or above means, and what to do about it."""
    status: int = response.status_code
    code = response.headers.get("X-Error-Code", "")
    said = " ".join(response.headers.get("X-Error-Message", "").split())[:200]
    answer = f"{endpoint} answered {status}" + (f" ({said})" if said else "")
    if status in (408, 429) or status >= 500:
        return TransientSourceError(
            f"{what}: {answer}",
            retry_after=_retry_after(response.headers),
            hint="Logging in with `hf auth login` allows more requests." if status == 429 else None,
        )
    if code == "GatedRepo":
        return SourceError(
            f"{what} is gated: {answer}",
            hint=f"Accept its licence at {endpoint}/{repository}, then `hf auth login` or set HF_TOKEN.",
        )
    if code == "RevisionNotFound":
        return SourceError(
            f"{what}: there is no such revision: {answer}", hint=f"See {endpoint}/{repository}/commits/main."
        )
    if status in (401, 403):
        return SourceError(
            f"{what} is not shown to you: {answer}",
            hint="Check the name. If it is private or gated, accept its licence on its page, then"
            " `hf auth login` or set HF_TOKEN; a token that has run out is refused like this too.",
        )
    if status == 404:
        return SourceError(f"{what} does not exist: {answer}", hint="Check the name, and HF_ENDPOINT if it is set.")
    return SourceError(f"{what}: {answer}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by Retry-After (a number or a date) or by RateLimit, None without."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        reset = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
        return float(reset[1]) if reset else None


def _version() -> str | None:
    try:
        return importlib.metadata.version("loadstone")
    except importlib.metadata.PackageNotFoundError:
        return None
