"""Where files come from: a folder, a file, a Hub, the bundled model. `resolve` is the one way in."""

from .base import ModelFiles
from .resolve import resolve

__all__ = ["ModelFiles", "resolve"]
