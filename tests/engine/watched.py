"""A decoder that a test watches, holds up, breaks or puts words into; what it computes is the real decoder's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from loadstone.config import EngineConfig
from loadstone.engine import Engine
from loadstone.loaded import LoadedModel
from loadstone.model import Decoder, KVCache, Segment

PATIENCE = 60  # seconds, after which a test fails instead of waiting on


class Watched:
    """Passes everything on to a real decoder, and calls `before` and `after` around each pass."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.passes: list[list[tuple[Segment, list[int]]]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.after: Callable[[Sequence[Segment], torch.Tensor], torch.Tensor] = lambda segments, logits: logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, ids: Sequence[int], segments: Sequence[Segment], cache: KVCache) -> torch.Tensor:
        left = list(ids)
        self.passes.append([(one, [left.pop(0) for _ in range(one.length)]) for one in segments])
        self.before(len(self.passes))
        return self.after(segments, self._decoder.forward(ids, segments, cache))

    @property
    def begun(self) -> list[list[int]]:
        """The first tokens of each prompt that was read, in the order of reading."""
        return [ids for one in self.passes for segment, ids in one if segment.start == 0]

    def say(self, *tokens: int) -> None:
        """Let every answer be these tokens, the last of them again and again."""

        def after(segments: Sequence[Segment], logits: torch.Tensor) -> torch.Tensor:
            spoken, rows = torch.zeros_like(logits), iter(range(len(logits)))
            for segment in segments:
                prompt = next(one for turn in self.passes for one, _ in turn if is_same(one, segment))
                end = segment.start + segment.length - prompt.start - prompt.length
                for place in range(end - segment.wanted + 1, end + 1):
                    spoken[next(rows), tokens[min(place, len(tokens) - 1)]] = 1.0
            return spoken

        self.after = after


def is_same(one: Segment, other: Segment) -> bool:
    """Whether two segments are of one sequence, whose block table grows where it is."""
    return one.block_table.data_ptr() == other.block_table.data_ptr()


class Gate:
    """Holds a watched decoder before each pass until the test lets it through."""

    def __init__(self, watched: Watched) -> None:
        self._arrived, self._open = threading.Semaphore(0), threading.Semaphore(0)
        watched.before = self._wait

    def _wait(self, number: int) -> None:
        self._arrived.release()
        assert self._open.acquire(timeout=PATIENCE)

    def let(self, passes: int) -> None:
        """Let passes through, and return when the decoder waits before the next."""
        for _ in range(passes):
            self.arrive()
            self._open.release()
        self.arrive()
        self._arrived.release()

    def arrive(self) -> None:
        """Return when the decoder waits before a pass."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def open(self, passes: int = 100_000) -> None:
        """Hold up nothing any more, or not the next passes, and return at once."""
        self._open.release(passes)


@contextmanager
def watched_engine(
    model: LoadedModel, wish: EngineConfig | None = None, **changes: Any
) -> Iterator[tuple[Engine, Watched]]:
    """Another engine on a loaded model's decoder, with its own cache; `changes` are the plan's.

    It reads every prompt whole and guesses nothing, unless `wish` says otherwise.
    """
    watched = Watched(model.decoder)
    plan = replace(model.plan, **changes)
    wish = wish or EngineConfig(prefix_reuse=False, speculation=False)
    engine = Engine(watched, model.tokenizer, model.engine.template, plan, wish)  # type: ignore[arg-type]
    try:
        yield engine, watched
    finally:
        watched.before = lambda number: None
        engine.close()
