"""Folders in object stores that speak S3, through fsspec where it and s3fs are installed; the only importer of fsspec.

Address, key and secret come from where AWS's own tools and fsspec keep them (AWS_ENDPOINT_URL, AWS_PROFILE,
FSSPEC_S3_ANON …) and are never looked at here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from loadstone.errors import LoadstoneError, SourceError, TransientSourceError, is_transient

from .base import NoRouteError, RemoteFile
from .folder import FolderSource

BLOCK = 8 * 2**20  # bytes of one request

_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError"}


class S3(FolderSource):
    """A folder, or a single .gguf file, in a bucket."""

    name = "s3"
    summary = "a folder with SHA256SUMS in a bucket, through fsspec: s3://bucket/folder"

    def read_all(self, place: str, most: int) -> bytes | None:
        with _translated(place):
            try:
                found: bytes = _store().cat_file(place, start=0, end=most + 1)
            except FileNotFoundError:
                return None
        if len(found) > most:
            raise SourceError(f"{place} has more than {most} bytes, where a list should be")
        return found

    def size_of(self, place: str) -> int:
        with _translated(place):
            return int(_store().info(place)["size"])

    def read(self, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        with _translated(file.place):
            store = _store()
            for first in range(start, stop, BLOCK):
                yield store.cat_file(file.place, start=first, end=min(first + BLOCK, stop))


def _store() -> Any:
    """Return a client for the settings in the environment as it is now."""
    return _made(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@lru_cache(maxsize=1)
def _made(settings: tuple[tuple[str, str], ...]) -> Any:
    """Return a client that tries each request once: when to try again is not its to say."""
    try:
        import fsspec

        store = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,  # fsspec's own cache does not look at the environment
            use_listings_cache=False,
            config_kwargs={"retries": {"max_attempts": 0}},
        )
    except ImportError as error:
        raise SourceError(f"s3:// needs fsspec with s3fs: {error}", hint="Install it: pip install s3fs") from error
    store.retries = 1
    return store


@contextmanager
def _translated(place: str) -> Iterator[None]:
    """Turn what fsspec and what it stands on raise into this library's errors, keeping the cause."""
    try:
        yield
    except (LoadstoneError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError):
            raise SourceError(f"{place} does not exist", hint="Check bucket and path.") from error
        raise
    except Exception as error:
        raise _failure(error, place) from error


def _failure(error: Exception, place: str) -> SourceError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if isinstance(error, PermissionError) or kinds & {"NoCredentialsError", "PartialCredentialsError"}:
        return SourceError(
            f"{place} is not shown to you: {said}",
            hint="Log in as for AWS's own tools (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or say"
            " that the bucket is public: FSSPEC_S3_ANON=true.",
        )
    if kinds & _UNREACHABLE:
        return NoRouteError(f"{place}: there is no route to the store: {said}", hint="Check AWS_ENDPOINT_URL.")
    if is_transient(error) or (_status(error) or 0) >= 429 or kinds & {"HTTPClientError", "ClientError"}:
        return TransientSourceError(f"{place}: {said}", hint="Try again; what has arrived is kept.")
    return SourceError(f"{place}: {said}")


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an error comes from; botocore keeps it in a dictionary of one of the causes."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status if isinstance(status, int) else None
        error = error.__cause__
    return None
