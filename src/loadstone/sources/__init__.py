"""Where files come from: a folder, a file, a Hub, the bundled model. `resolve` is the one way in."""

from .base import ModelFiles
from .choose import COMPANIONS
from .hub import hub_weights
from .remote import Headers
from .resolve import resolve, resolve_headers

__all__ = ["COMPANIONS", "Headers", "ModelFiles", "hub_weights", "resolve", "resolve_headers"]
