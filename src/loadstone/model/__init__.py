"""The decoder of a model and how it is built from a plan: knows tokens, not text."""

from .build import build, can_be_kept, keep
from .cache import KVCache
from .decoder import Decoder, Segment

__all__ = ["Decoder", "KVCache", "Segment", "build", "can_be_kept", "keep"]
