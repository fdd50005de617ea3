"""Where Loadstone's own files go: the platform's folders, or LOADSTONE_HOME for all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs


def config_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder in which the user's config.yaml is looked for."""
    return _home(environ) or platformdirs.user_config_path("loadstone", appauthor=False)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for what can be made again at any time."""
    home = _home(environ)
    return home / "cache" if home else platformdirs.user_cache_path("loadstone", appauthor=False)


def _home(environ: Mapping[str, str]) -> Path | None:
    named = environ.get("LOADSTONE_HOME")
    return Path(os.path.expanduser(named)) if named else None
