"""Requests to tokens to text: templates, batching, sampling, stop strings, cancelling."""

from .engine import Engine
from .request import Chunk, GenerationResult, Stream, Timing, Usage
from .tool_formats import ToolCall

__all__ = ["Chunk", "Engine", "GenerationResult", "Stream", "Timing", "ToolCall", "Usage"]
