"""The only importer of ModelScope's library, which may not be installed: its login, and what it fetched before.

The bytes are not fetched through it. It compares every file with its hash anew each time that it is asked for a model,
which for 15 GB takes longer than a load, prints progress bars, and retries by rules of its own.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


def login() -> str | None:
    """Return the token that the user logged in with through ModelScope's library; None without either."""
    if not is_installed():
        return None
    with _quiet() as library:
        token: str | None = library.HubConfig().token
        return token


def fetched_folder(repository: str, revision: str | None) -> Path | None:
    """Return the folder in which ModelScope's library keeps files of a model, perhaps not all; None without one."""
    if not is_installed():
        return None
    with _quiet() as library:
        api = library.HubApi(library.HubConfig())
        try:
            return Path(api.download_repo(repository, "model", revision=revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - it has none, or cannot say: the files are fetched instead
            return None


@cache
def is_installed() -> bool:
    """Tell whether ModelScope's library is there."""
    return importlib.util.find_spec("modelscope_hub") is not None


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield the library, with its log, which it writes to standard error on its own, kept to what is wrong."""
    import modelscope_hub

    logger = logging.getLogger("modelscope_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield modelscope_hub
    finally:
        logger.setLevel(level)
