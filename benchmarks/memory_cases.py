"""What `benchmarks.memory` loads: shapes of several architectures, in every strategy, for short and long contexts."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoints import SHAPES, Shape

BUNDLED = "smollm2"  # real weights, in a GGUF file
MEMORY_SHAPES = {
    **SHAPES,
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 3072, 151_936, True, model_type="qwen3", head_dim=128),
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 8192, 128_256, True, model_type="llama"),
    "mistral-0.4b": Shape(1024, 24, 16, 4, 3584, 32_768, False, model_type="mistral", sliding_window=1024),
}


ANSWER_TOKENS = 16
SPARE_TOKENS = 32  # prompts are a little longer than asked for, and their answers follow


@dataclass(frozen=True)
class Case:
    """One way to load a model; `is_first` means that the store does not have its weights yet."""

    model: str
    strategy: str
    context: int
    streams: int
    is_first: bool

    @property
    def wish(self) -> str:
        """What is asked for, whether the store has it or not: "qwen2.5-0.5b 4bit, 2 × 4096"."""
        return f"{self.model} {self.strategy}, {self.streams} × {self.context}"

    @property
    def name(self) -> str:
        """For tables, and as a key: "qwen2.5-0.5b 4bit, 2 × 4096, first"."""
        return f"{self.wish}, {'first' if self.is_first else 'later'}"


def prompt_tokens(case: Case) -> int:
    """Return about how many tokens of a stream's context its prompt fills."""
    return case.context - SPARE_TOKENS - ANSWER_TOKENS


GRID = {
    BUNDLED: [("4bit", 2048, 1), ("4bit", 512, 8), ("8bit", 2048, 1), ("none", 2048, 1)],
    "mistral-0.4b": [("4bit", 4096, 1), ("8bit", 1024, 4), ("none", 4096, 1)],
    "qwen2.5-0.5b": [("4bit", 512, 1), ("4bit", 8192, 1), ("4bit", 512, 32), ("8bit", 4096, 1), ("none", 4096, 1)],
    "qwen3-0.6b": [("4bit", 4096, 1), ("4bit", 1024, 8), ("8bit", 4096, 1), ("none", 1024, 4)],
    "llama-3.2-1b": [("4bit", 2048, 1), ("4bit", 512, 8), ("8bit", 2048, 1), ("none", 2048, 1)],
    "qwen2.5-1.5b": [("4bit", 4096, 1), ("8bit", 1024, 4), ("none", 1024, 1)],
    "qwen2.5-7b": [("4bit", 512, 1), ("4bit", 1024, 2), ("8bit", 512, 1)],
}
"""The strategy, context and streams of each model's loads."""


def cases_of(model: str) -> list[Case]:
    """Return a model's cases; each is loaded with an empty store, and again from it where it keeps the strategy."""
    return [
        Case(model, strategy, context, streams, is_first)
        for strategy, context, streams in GRID[model]
        for is_first in ((True,) if strategy == "none" else (True, False))
    ]
