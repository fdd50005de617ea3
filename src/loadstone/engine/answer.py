"""One answer, waiting or under way: what it may take, what it has come to, and which tokens come next.

Its text goes to who asked as it is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

from .logprobs import TokenLogprob
from .prefix_cache import Places
from .request import Chunk, GenerationResult, Request, Timing, Usage
from .sampling import Sampler
from .speculation import Drafter
from .stop import StopStrings
from .text import TextStream


@dataclass(eq=False)
class Answer:
    """One answer, waiting or under way: its places in the cache, and what it has come to.

    It may take `room` places, which are promised to it as soon as it is under way.
    """

    request: Request
    sampler: Sampler
    text: TextStream
    stop: StopStrings
    room: int
    places: Places | None = None
    drafter: Drafter | None = None
    started_at: float = 0.0
    read: int = 0  # tokens of the prompt that are in the cache
    known: int = 0  # of these, those that were there before
    drafts: list[int] = field(default_factory=list)  # what is guessed to come after the last token
    drafted: int = 0
    accepted: int = 0
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token_at: float = 0.0

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt)

    @property
    def unread(self) -> int:
        """How many tokens of the prompt are still to be read."""
        return len(self.request.prompt) - self.read

    @property
    def is_cancelled(self) -> bool:
        return self.request.is_cancelled

    @property
    def length(self) -> int:
        """How many tokens prompt and answer have."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def cached(self) -> list[int]:
        """The tokens whose keys and values are in the cache: all but the last that was chosen."""
        return [*self.request.prompt[: self.read], *self.tokens[:-1]]

    def turn(self, chunk: int) -> tuple[Sequence[int], int, int]:
        """Return the tokens that come next, at most `chunk` of a prompt; the first one's position; logits wanted."""
        if self.is_reading:
            start = self.read
            new = self.request.prompt[start : start + chunk]
            self.read += len(new)
            return new, start, 1
        return [self.tokens[-1], *self.drafts], self.length - 1, 1 + len(self.drafts)

    def take_back(self, start: int) -> None:
        """Undo a turn that began at position `start` and came to nothing."""
        if not self.tokens:
            self.read = start
        self.drafts = []

    def add(self, token: int, ends: Container[int]) -> str | None:
        """Send what text a chosen token completes; return why the answer ends with it, or None."""
        if token in ends:
            return "stop"
        text, is_stopped = self.stop.push(self.text.push(token))
        self._send(text)
        if is_stopped or self.sampler.is_over:
            return "stop"
        return "length" if self.length >= self.room else None

    def flush(self, reason: str) -> str:
        """Send what was held back; return why the answer ends, which a stop string in it may decide after all."""
        last, _ = self.stop.push(self.text.flush())
        self._send(last + self.stop.flush())
        if self.request.reader is not None:
            self._put(self.request.reader.flush())
        return "stop" if self.stop.hit else reason

    def _send(self, text: str) -> None:
        self._put(text if self.request.reader is None else self.request.reader.push(text))

    def _put(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.request.line.put(Chunk(text))

    def result(self, reason: str) -> GenerationResult:
        """Return what was asked for, as it is now, ended for this reason."""
        text, reader = "".join(self.pieces), self.request.reader
        is_value = self.request.sampling.json_schema is not None and reason == "stop" and not self.stop.hit
        return GenerationResult(
            text, reason, self._usage(), self._timing(), tokens=tuple(self.tokens), logprobs=tuple(self.logprobs),
            parsed=_value(text) if is_value else None, tool_calls=tuple(reader.calls) if reader else (),
            tool_errors=tuple(reader.errors) if reader else (),
        )  # fmt: skip

    def _usage(self) -> Usage:
        return Usage(len(self.request.prompt), len(self.tokens), self.known, self.drafted, self.accepted)

    def _timing(self) -> Timing:
        now, asked = time.perf_counter(), self.request.asked_at
        first = self.first_token_at or now
        speed = (len(self.tokens) - 1) / (now - first) if len(self.tokens) > 1 and now > first else 0.0
        return Timing((self.started_at or now) - asked, first - asked, now - asked, speed)


def _value(text: str) -> Any:
    """Return the value that JSON text stands for; None for one that Python cannot have."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or a thousand lists in one another
        return None
