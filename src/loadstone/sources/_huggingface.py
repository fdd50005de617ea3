"""The only importer of huggingface_hub: its session (proxies, certificates), its token, and its locks.

Bytes are streamed in `http`: that library's own download hides retries and sleeps, drops a partial file when it
fails, and does not compare content with its hash.
"""

from __future__ import annotations

import importlib.metadata
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
    WeakFileLock,
    build_hf_headers,
)


def session() -> Any:
    """Return the HTTP client that all requests of the process share: httpx's, or httpx2's, with the same names."""
    return get_session()


def headers() -> dict[str, str]:
    """Return the headers of a request to the Hub: who asks, and the user's token, from where the Hub keeps it."""
    found: dict[str, str] = build_hf_headers(library_name="loadstone", library_version=_version())
    return found


def user_agent() -> str:
    """Return who asks, in one line, for servers other than the Hub."""
    return f"loadstone/{_version() or 'unknown'}"


def lock(file: Path) -> AbstractContextManager[Any]:
    """Return the lock that programs hold while they fetch a file."""
    found: AbstractContextManager[Any] = WeakFileLock(file)
    return found


def _version() -> str | None:
    try:
        return importlib.metadata.version("loadstone")
    except importlib.metadata.PackageNotFoundError:
        return None
