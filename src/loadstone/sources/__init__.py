"""Where files come from: a folder, a file, a Hub, the bundled model. `resolve` is the one way in."""

from .base import ModelFiles
from .choose import COMPANIONS
from .hub import hub_weights
from .resolve import resolve

__all__ = ["COMPANIONS", "ModelFiles", "hub_weights", "resolve"]
