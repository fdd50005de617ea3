"""A loaded model seen as a transformers model: the same weights, in the forms that our products read."""

from .bridge import Bridge, build_bridge

__all__ = ["Bridge", "build_bridge"]
