"""Checkpoints whose weights are quantised already: one file a format, found through `registry`."""

from .registry import join_weights, layout_of, method_of, pieces_of

__all__ = ["join_weights", "layout_of", "method_of", "pieces_of"]
