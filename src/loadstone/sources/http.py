"""Bytes over HTTP: one request an attempt, redirects followed by hand, and refusals told in words with a remedy.

What identifies the user is in request headers only, and goes to the host that it is for and no other: no error and no
event carries a header or a query.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from loadstone.errors import LoadstoneError, SourceError, TransientSourceError

from .base import NoPartsError, NoRouteError

STALL_SECONDS = 30.0
"""A connection that brings nothing for so long is given up; how long a whole file takes is not limited."""

MOST_PASSED_OVER = 16 * 2**20
"""Bytes that are taken in for nothing, where a server sends a whole file and not the part that was asked for."""

MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PRIVATE = ("authorization", "cookie")

Explain = Callable[[int, Mapping[str, str], str], SourceError | None]
Headers = Callable[[], Mapping[str, str]]


class NotThereError(SourceError):
    """A server says that nothing is at a place."""


def _no_headers() -> Mapping[str, str]:
    return {}


def _no_words(status: int, headers: Mapping[str, str], answer: str) -> SourceError | None:
    return None


@dataclass(frozen=True)
class Site:
    """A server, and how it is asked: `address` for people, `what` is wanted of it, `setting` that leads to it.

    `headers` are made anew for each request. `explain` makes a refusal's error from its status, its headers and the
    words for it so far, or returns None: then `not_there` and `not_allowed` are the hints of 404, and of 401 and 403.
    """

    address: str
    what: str
    setting: str
    not_there: str
    not_allowed: str
    headers: Headers = field(default=_no_headers, repr=False)
    explain: Explain = _no_words

    def read(self, url: str, name: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of the file `name` of `size` bytes, or more where the server sends more.

        Raises NoPartsError where the server sends the whole file and `start` is far into it, or another part.
        """
        part = {} if (start, stop) == (0, size) else {"Range": f"bytes={start}-{stop - 1}"}
        with self._translated(), self._opened(url, part) as response:
            passing = 0
            if response.status_code == 206 and _range_start(response.headers) != start:
                raise NoPartsError(f"{name}: another part arrived than was asked for")
            if response.status_code == 200:
                passing = start  # the server sends the whole file, asked for a part or not
            if response.status_code == 416 or passing > MOST_PASSED_OVER:
                raise NoPartsError(
                    f"{name}: the server sends no parts of files, or not this one", hint="Fetch the model with `pull`."
                )
            self._check(response)
            for block in response.iter_bytes():
                rest = block[passing:]
                passing -= len(block) - len(rest)
                if rest:
                    yield rest

    def read_all(self, url: str, most: int) -> bytes:
        """Return what is at `url`; raise SourceError where it is more than `most` bytes."""
        found = bytearray()
        with self._translated(), self._opened(url, {}) as response:
            self._check(response)
            for block in response.iter_bytes():
                found += block
                if len(found) > most:
                    raise SourceError(
                        f"{self.what}: {self.address} sends more than {most} bytes where a list should be"
                    )
        return bytes(found)

    def read_json(self, url: str, most: int) -> Mapping[str, Any]:
        """Return the JSON object at `url`; raise SourceError where it is none, or is more than `most` bytes."""
        try:
            found = json.loads(self.read_all(url, most))
            if not isinstance(found, dict):
                raise ValueError(f"{type(found).__name__} instead of an object")
        except (ValueError, RecursionError) as error:
            raise self.unlike(f"{type(error).__name__}: {error}") from error
        return found

    def unlike(self, reason: str) -> SourceError:
        """Return the error for an answer that no server of this kind gives."""
        return SourceError(
            f"{self.what}: {self.address} did not answer as it should: {reason}",
            hint=f"Check {self.setting}; a page that asks to log in to a network answers like this too.",
        )

    def size_of(self, url: str) -> int:
        """Return the size of the file at `url` in bytes, as the server tells it."""
        with self._translated(), self._opened(url, {"Range": "bytes=0-0"}) as response:
            if response.status_code == 416:
                return 0  # a range of an empty file
            self._check(response)
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            told: str = total if response.status_code == 206 else response.headers.get("Content-Length", "")
            if not re.fullmatch(r"\d{1,18}", told):
                raise SourceError(f"{self.what}: {self.address} does not tell the size of {_plain(url)}")
            return int(told)

    @contextmanager
    def _opened(self, url: str, part: Mapping[str, str]) -> Iterator[Any]:
        from . import _huggingface

        # A range of a compressed body would be of other bytes.
        headers = {**self.headers(), **part, "Accept-Encoding": "identity"}
        for _ in range(MOST_REDIRECTS + 1):
            opened = _huggingface.session().stream(
                "GET", url, headers=headers, timeout=STALL_SECONDS, follow_redirects=False
            )
            with opened as response:
                place = response.headers.get("Location")
                if response.status_code not in _REDIRECTS or place is None:
                    yield response
                    return
            url, headers = self._redirected(url, place, headers)
        raise SourceError(f"{self.what}: {self.address} redirects more than {MOST_REDIRECTS} times")

    def _redirected(self, url: str, place: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Return where a redirect leads, and the headers for there: what is private goes to no other server."""
        target = urljoin(url, place)
        old, new = urlsplit(url), urlsplit(target)
        if new.scheme != "https" and new.scheme != old.scheme:
            raise SourceError(
                f"{self.what}: {self.address} redirects from {old.scheme} to {new.scheme or 'nowhere'}, which is not"
                " followed",
                hint=f"Check {self.setting}.",
            )
        if (old.scheme, old.netloc) == (new.scheme, new.netloc):
            return target, dict(headers)
        return target, {name: value for name, value in headers.items() if name.lower() not in _PRIVATE}

    def _check(self, response: Any) -> None:
        if response.status_code not in (200, 206):
            raise self._refusal(response.status_code, response.headers)

    def _refusal(self, status: int, headers: Mapping[str, str]) -> SourceError:
        """Return what a status other than success means, and what to do about it."""
        said = " ".join(headers.get("X-Error-Message", "").split())[:200]
        answer = f"{self.address} answered {status}" + (f" ({said})" if said else "")
        known = self.explain(status, headers, answer)
        if known is not None:
            return known
        if status in (408, 429) or status >= 500:
            return TransientSourceError(f"{self.what}: {answer}", retry_after=retry_after(headers))
        if status in (401, 403):
            return SourceError(f"{self.what} is not shown to you: {answer}", hint=self.not_allowed)
        if status in (404, 410):
            return NotThereError(f"{self.what} does not exist: {answer}", hint=self.not_there)
        return SourceError(f"{self.what}: {answer}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the HTTP library raises into this library's errors, keeping the cause."""
        try:
            yield
        except LoadstoneError:
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> SourceError:
        """Return what an error means that is not an answer."""
        # By name: the session is of httpx or of httpx2; the names are the same.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        what, address = self.what, self.address
        if "OfflineModeIsEnabled" in kinds:
            return SourceError(f"{what}: HF_HUB_OFFLINE was set when this process began", hint="Unset it, start again.")
        if "ConnectError" in kinds and "CERTIFICATE" in str(error).upper():
            return SourceError(
                f"{what}: the certificate of {address} is not trusted: {error}",
                hint="Behind a proxy that opens TLS, set SSL_CERT_FILE to its certificate.",
            )
        if kinds & {"ConnectError", "ConnectTimeout", "ProxyError"}:
            return NoRouteError(
                f"{what}: there is no route to {address}: {error}",
                hint=f"Check the connection, HTTPS_PROXY and {self.setting}, or name a model on this machine.",
            )
        if kinds & {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError"}:
            return TransientSourceError(
                f"{what}: the connection to {address} broke: {type(error).__name__}: {error}",
                hint="Try again; what has arrived is kept.",
            )
        return SourceError(
            f"{what}: {address} cannot be asked: {type(error).__name__}: {error}", hint=f"Check {self.setting}."
        )


def _plain(url: str) -> str:
    """Return a URL without what might be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


def _range_start(headers: Mapping[str, str]) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by Retry-After (a number or a date) or by RateLimit, None without."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        reset = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
        return float(reset[1]) if reset else None
