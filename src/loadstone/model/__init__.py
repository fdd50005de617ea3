"""The decoder of a model and how it is built from a plan: knows tokens, not text."""

from .batch import Segment
from .build import build, can_be_kept, keep
from .cache import KVCache, block_table_of, blocks_for
from .decoder import Decoder

__all__ = ["Decoder", "KVCache", "Segment", "block_table_of", "blocks_for", "build", "can_be_kept", "keep"]
