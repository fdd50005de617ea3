"""Runs requests together: each step of the decoder serves every sequence that is under way.

One thread owns the decoder and the cache. A request waits until the cache has room for all that it may need, first
come first served; its prompt is read in chunks, between the steps of those already answering. Knows tokens and
text pieces; nothing of templates.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from loadstone.errors import GenerationError, LoadstoneError, handle_exceptions
from loadstone.memory import forget_frames
from loadstone.model import Decoder, Segment

from .request import Chunk, GenerationResult, Request, Timing, Usage
from .sampling import Sampler
from .stop import StopStrings
from .text import TextStream

MOST_TOGETHER = 64  # sequences in one step; more would make every one of them slow


@dataclass(eq=False)
class Answer:
    """One answer, waiting or under way: its places in the cache, and what it has come to.

    It may take `room` places; those it has begin at `base`, which is None as long as it waits.
    """

    request: Request
    sampler: Sampler
    text: TextStream
    stop: StopStrings
    room: int
    base: int | None = None
    started_at: float = 0.0
    read: int = 0  # tokens of the prompt that are in the cache
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    first_token_at: float = 0.0

    @property
    def is_reading(self) -> bool:
        return self.read < len(self.request.prompt)

    @property
    def is_cancelled(self) -> bool:
        return self.request.cancelled.is_set()

    def take_turn(self, chunk: int) -> tuple[Sequence[int], int]:
        """Return the tokens that come next, at most `chunk`, and where the first of them goes."""
        prompt = self.request.prompt
        if not self.is_reading:
            return self.tokens[-1:], len(prompt) + len(self.tokens) - 1
        start = self.read
        new = prompt[start : start + chunk]
        self.read += len(new)
        return new, start


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
        self.vocabulary = decoder.embedding.rows
        self.cache = decoder.new_cache(cache_tokens)
        self._new_text = new_text
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._changed = threading.Condition()
        self._is_draining = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> None:
        """Queue a request; raises GenerationError when it can never be served, or when this is closed."""
        self._check(request.prompt)
        sampling = request.sampling
        room = min(len(request.prompt) + sampling.max_new_tokens, self.context)
        answer = Answer(request, Sampler(sampling, request.prompt), self._new_text(), StopStrings(sampling.stop), room)
        with self._changed:
            if self._is_closed or self._is_draining:
                raise GenerationError("The model was unloaded.", hint="Load it again before asking.")
            self._waiting.append(answer)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="loadstone-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more requests, and return when none is waiting or running."""
        with self._changed:
            self._is_draining = True
        self.wait_until_idle()

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
        """End the thread and every request with GenerationError, and let go of the decoder and the cache."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._changed:
            for answer in (*self._running, *self._waiting):
                answer.request.line.put(GenerationError("The model was unloaded while the answer was being made."))
            self._waiting.clear()
            self._running.clear()
            self._changed.notify_all()
        del self.cache, self.decoder

    def _check(self, prompt: Sequence[int]) -> None:
        length = len(prompt)
        if length == 0:
            raise GenerationError("The prompt is empty.", hint="Give at least one character, or a message.")
        if length >= self.context:
            raise GenerationError(
                f"The prompt has {length} tokens; the context has {self.context} with room for at least one more.",
                hint="Shorten the prompt, or load the model with a larger `context`.",
            )
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < self.vocabulary]
        if unknown:
            raise GenerationError(
                f"The prompt has token {unknown[0]}, and the model knows {self.vocabulary} tokens, from 0 on.",
                hint="The tokenizer is not the one that this model was made with: see its files.",
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting or self._running)
                if self._is_closed:
                    return
                with self._failing_only(*self._waiting):
                    self._admit()
            self._drop_cancelled()
            turn = self._turn()
            with self._failing_only(*turn):
                self._step(turn)
            with self._changed:
                self._changed.notify_all()

    def _admit(self) -> None:
        """Start waiting requests, in order, as long as the cache has room for all that each may need."""
        while self._waiting and len(self._running) < MOST_TOGETHER:
            answer = self._waiting[0]
            answer.base = self.cache.reserve(answer.room)
            if answer.base is None:
                return
            answer.started_at = time.perf_counter()
            self._running.append(self._waiting.popleft())

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [answer for answer in (*self._running, *self._waiting) if answer.is_cancelled]
        for answer in dropped:
            with self._failing_only(answer):
                self._finish(answer, "cancelled")

    @contextmanager
    def _failing_only(self, *answers: Answer) -> Iterator[None]:
        """Give whatever is raised inside to those who wait for `answers`, and let the thread go on."""
        try:
            with handle_exceptions("make the answer", into=GenerationError):
                yield
        except LoadstoneError as error:
            forget_frames(error)
            for answer in answers:
                if answer in self._running or answer in self._waiting:
                    self._leave(answer)
                    answer.request.line.put(error)

    def _turn(self) -> list[Answer]:
        """Return who is in the next step: all that are answering, and the first that still reads its prompt."""
        reading = [answer for answer in self._running if answer.is_reading]
        return [answer for answer in self._running if not answer.is_reading] + reading[:1]

    def _step(self, turn: list[Answer]) -> None:
        ids: list[int] = []
        segments: list[Segment] = []
        for answer in turn:
            assert answer.base is not None  # it runs
            new, start = answer.take_turn(self.chunk)
            ids.extend(new)
            segments.append(Segment(answer.base, start, len(new)))
        if not turn:
            return
        for answer, row in zip(turn, self.decoder.forward(ids, segments, self.cache), strict=True):
            if not answer.is_reading:
                with self._failing_only(answer):
                    self._take(answer, row)

    def _take(self, answer: Answer, logits: torch.Tensor) -> None:
        """Choose the next token of an answer, and send what text it completes."""
        token = answer.sampler.choose(logits)
        if not answer.tokens:
            answer.first_token_at = time.perf_counter()
        answer.tokens.append(token)
        if token in self.ends:
            self._finish(answer, "stop")
            return
        text, is_stopped = answer.stop.push(answer.text.push(token))
        self._send(answer, text)
        if is_stopped:
            self._finish(answer, "stop")
        elif len(answer.request.prompt) + len(answer.tokens) >= answer.room:
            self._finish(answer, "length")

    def _send(self, answer: Answer, text: str) -> None:
        if text:
            answer.pieces.append(text)
            answer.request.line.put(Chunk(text))

    def _finish(self, answer: Answer, reason: str) -> None:
        """Send what was held back and the result, and give the places in the cache back."""
        last, _ = answer.stop.push(answer.text.flush())
        self._send(answer, last + answer.stop.flush())
        if answer.stop.hit:
            reason = "stop"
        self._leave(answer)
        result = GenerationResult("".join(answer.pieces), reason, _usage(answer), _timing(answer))
        answer.request.line.put(Chunk("", result))

    def _leave(self, answer: Answer) -> None:
        with self._changed:  # or somebody finds nothing under way, and renews the cache, before its places are back
            if answer.base is None:
                self._waiting.remove(answer)
            else:
                self._running.remove(answer)
                self.cache.release(answer.base, answer.room)


def _usage(answer: Answer) -> Usage:
    return Usage(len(answer.request.prompt), len(answer.tokens))


def _timing(answer: Answer) -> Timing:
    now, asked = time.perf_counter(), answer.request.asked_at
    first = answer.first_token_at or now
    speed = (len(answer.tokens) - 1) / (now - first) if len(answer.tokens) > 1 and now > first else 0.0
    return Timing((answer.started_at or now) - asked, first - asked, now - asked, speed)
