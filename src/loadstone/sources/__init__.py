"""Where files come from: a folder, a file, a Hub, the bundled model, and more. `resolve` is the one way in."""

from .base import Listing, ModelFiles, NoPartsError, Reference, RemoteFile, Terms
from .cache import fetched_weights
from .choose import COMPANIONS
from .registry import SOURCES, register_source
from .remote import Headers
from .resolve import resolve, resolve_headers
from .source import RemoteSource, Source

__all__ = [
    "COMPANIONS",
    "SOURCES",
    "Headers",
    "Listing",
    "ModelFiles",
    "NoPartsError",
    "Reference",
    "RemoteFile",
    "RemoteSource",
    "Source",
    "Terms",
    "fetched_weights",
    "register_source",
    "resolve",
    "resolve_headers",
]
