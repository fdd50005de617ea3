"""Runs requests together: each step of the decoder serves every sequence that is under way.

One thread owns the decoder and the cache. A request waits until the cache has room for all that it may need, first
come first served; its prompt is read in chunks, between the steps of those already answering. Knows tokens and
text pieces; nothing of templates.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from loadstone.errors import GenerationError, LoadstoneError, ResourceError, is_out_of_memory
from loadstone.model import Decoder, Segment

from .request import Chunk, GenerationResult, Request, Timing, Usage
from .sampling import Sampler
from .stop import StopStrings
from .text import TextStream

MOST_TOGETHER = 64  # sequences in one step; more would make every one of them slow


@dataclass(eq=False)
class Answer:
    """One answer under way: its places in the cache, and what it has come to."""

    request: Request
    sampler: Sampler
    text: TextStream
    stop: StopStrings
    base: int
    room: int
    started_at: float
    read: int = 0  # tokens of the prompt that are in the cache
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    first_token_at: float = 0.0

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt)

    @property
    def position(self) -> int:
        """Where the token that was chosen last goes."""
        return len(self.request.prompt) + len(self.tokens) - 1


class Batcher:
    """Serves requests on one decoder, in a thread of its own that starts with the first.

    `context` is the most tokens one sequence may have; the cache has `cache_tokens` for all together.
    """

    def __init__(
        self, decoder: Decoder, *, context: int, cache_tokens: int, chunk: int, ends: Sequence[int],
        new_text: Callable[[], TextStream],
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.context = context
        self.chunk = chunk
        self.ends = frozenset(ends)
        self.cache = decoder.new_cache(cache_tokens)
        self._new_text = new_text
        self._waiting: deque[Request] = deque()
        self._running: list[Answer] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> None:
        """Queue a request; raises GenerationError when it can never be served, or when this is closed."""
        length = len(request.prompt)
        if length == 0:
            raise GenerationError("The prompt is empty.", hint="Give at least one character, or a message.")
        if length >= self.context:
            raise GenerationError(
                f"The prompt has {length} tokens; the context has {self.context} with room for at least one more.",
                hint="Shorten the prompt, or load the model with a larger `context`.",
            )
        with self._changed:
            if self._is_closed:
                raise GenerationError("The model was unloaded.", hint="Load it again before asking.")
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="loadstone-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Return when no request is waiting or running."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._running)

    def renew_cache(self) -> bool:
        """Give the cache's memory back and begin an empty one; return False when requests are under way."""
        with self._changed:
            if self._waiting or self._running or self._is_closed:
                return False
            tokens = self.cache.tokens
            del self.cache
            self.cache = self.decoder.new_cache(tokens)
            return True

    def close(self) -> None:
        """End the thread and every request with GenerationError, and let go of the cache."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        error = GenerationError("The model was unloaded while the answer was being made.")
        for request in [*self._waiting, *(sequence.request for sequence in self._running)]:
            request.line.put(error)
        self._waiting.clear()
        self._running.clear()
        del self.cache, self.decoder

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting or self._running)
                if self._is_closed:
                    return
                self._admit()
            self._drop_cancelled()
            self._step_or_fail()
            with self._changed:
                self._changed.notify_all()

    def _admit(self) -> None:
        """Start waiting requests, in order, as long as the cache has room for all that each may need."""
        while self._waiting and len(self._running) < MOST_TOGETHER:
            request = self._waiting[0]
            room = min(len(request.prompt) + request.sampling.max_new_tokens, self.context)
            base = self.cache.reserve(room)
            if base is None:
                return
            self._waiting.popleft()
            self._running.append(
                Answer(
                    request,
                    Sampler(request.sampling, request.prompt),
                    self._new_text(),
                    StopStrings(request.sampling.stop),
                    base,
                    room,
                    time.perf_counter(),
                )
            )

    def _drop_cancelled(self) -> None:
        for sequence in [one for one in self._running if one.request.cancelled.is_set()]:
            self._finish(sequence, "cancelled")
        with self._changed:
            dropped = [request for request in self._waiting if request.cancelled.is_set()]
            for request in dropped:
                self._waiting.remove(request)
        now = time.perf_counter()
        for request in dropped:
            waited = now - request.asked_at
            usage, timing = Usage(len(request.prompt), 0), Timing(waited, 0.0, waited, 0.0)
            request.line.put(Chunk("", GenerationResult("", "cancelled", usage, timing)))

    def _step_or_fail(self) -> None:
        """Make one step; whatever it raises goes to the requests that were in it, and the thread goes on."""
        turn = self._turn()
        if not turn:
            return
        try:
            self._step(turn)
        except Exception as error:  # noqa: BLE001 - the consumers raise it
            failure: Exception = error
            if is_out_of_memory(error) and not isinstance(error, LoadstoneError):
                failure = ResourceError(
                    f"Memory ran out while answering: {error}", hint="Lower `context`, or send fewer requests at once."
                )
                failure.__cause__ = error
            for sequence in turn:
                if sequence in self._running:
                    self._leave(sequence)
                    sequence.request.line.put(failure)

    def _turn(self) -> list[Answer]:
        """Return who is in the next step: all that are answering, and the first that still reads its prompt."""
        reading = [sequence for sequence in self._running if sequence.is_reading]
        return [sequence for sequence in self._running if not sequence.is_reading] + reading[:1]

    def _step(self, turn: list[Answer]) -> None:
        ids: list[int] = []
        segments: list[Segment] = []
        for sequence in turn:
            if sequence.is_reading:
                new = sequence.request.prompt[sequence.read : sequence.read + self.chunk]
                segments.append(Segment(sequence.base, sequence.read, len(new)))
                ids.extend(new)
                sequence.read += len(new)
            else:
                segments.append(Segment(sequence.base, sequence.position, 1))
                ids.append(sequence.tokens[-1])
        logits = self.decoder.forward(ids, segments, self.cache)
        for sequence, row in zip(turn, logits, strict=True):
            if not sequence.is_reading:
                try:
                    self._take(sequence, row)
                except LoadstoneError as error:
                    self._leave(sequence)
                    sequence.request.line.put(error)

    def _take(self, sequence: Answer, logits: torch.Tensor) -> None:
        """Choose the next token of a sequence, and send what text it completes."""
        token = sequence.sampler.choose(logits)
        if not sequence.tokens:
            sequence.first_token_at = time.perf_counter()
        sequence.tokens.append(token)
        if token in self.ends:
            self._finish(sequence, "stop")
            return
        text, is_stopped = sequence.stop.push(sequence.text.push(token))
        self._send(sequence, text)
        if is_stopped:
            self._finish(sequence, "stop")
        elif len(sequence.request.prompt) + len(sequence.tokens) >= sequence.room:
            self._finish(sequence, "length")

    def _send(self, sequence: Answer, text: str) -> None:
        if text:
            sequence.pieces.append(text)
            sequence.request.line.put(Chunk(text))

    def _finish(self, sequence: Answer, reason: str) -> None:
        """Send what was held back and the result, and give the places in the cache back."""
        last, _ = sequence.stop.push(sequence.text.flush())
        self._send(sequence, last + sequence.stop.flush())
        if sequence.stop.hit:
            reason = "stop"
        self._leave(sequence)
        result = GenerationResult("".join(sequence.pieces), reason, _usage(sequence), _timing(sequence))
        sequence.request.line.put(Chunk("", result))

    def _leave(self, sequence: Answer) -> None:
        self._running.remove(sequence)
        self.cache.release(sequence.base, sequence.room)


def _usage(sequence: Answer) -> Usage:
    return Usage(len(sequence.request.prompt), len(sequence.tokens))


def _timing(sequence: Answer) -> Timing:
    now, asked = time.perf_counter(), sequence.request.asked_at
    first = sequence.first_token_at or now
    speed = (len(sequence.tokens) - 1) / (now - first) if len(sequence.tokens) > 1 and now > first else 0.0
    return Timing(sequence.started_at - asked, first - asked, now - asked, speed)
