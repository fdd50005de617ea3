"""Runs requests together: each step of the decoder serves every sequence that is under way.

One thread owns the decoder and the cache. A request waits until the cache has room for all that it may need, first
come first served; what its prompt shares with an earlier one is not read again, and the rest is read in chunks, between
the steps of those already answering. Knows tokens and text pieces; nothing of templates.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from loadstone.config import EngineConfig
from loadstone.errors import (
    ContextLengthError,
    GenerationError,
    LoadstoneError,
    QueueFullError,
    ResourceError,
    handle_exceptions,
    is_out_of_memory,
)
from loadstone.memory import forget_frames, give_back
from loadstone.model import Decoder, Segment
from loadstone.planner.estimate import LARGEST_STEP
from loadstone.quantization.kernels.words import KV_BLOCK
from loadstone.telemetry import emit

from .answer import Answer
from .logprobs import logprob_of
from .prefix_cache import PrefixCache, common
from .prefix_file import read_prefixes, write_prefixes
from .request import Chunk, Request
from .sampling import Sampler, largest_tokens
from .speculation import MOST, Costs, Drafter
from .stop import StopStrings
from .text import TextStream
from .width import Pressure, Width


class Batcher:
    """Serves requests on one decoder, in a thread of its own that starts with the first.

    `context` is the most tokens one sequence may have; the cache has `cache_tokens` for all together, and `chunk`
    tokens of prompts are read in a step. Nobody joins others while less than `reserve_bytes` are left on the machine.
    """

    def __init__(
        self, decoder: Decoder, *, context: int, cache_tokens: int, chunk: int, ends: Sequence[int],
        new_text: Callable[[], TextStream], spell: Callable[[int], str], wish: EngineConfig, reserve_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.context = context
        self._widest = self.width = Width(chunk, guesses=wish.speculation)
        self._pressure = Pressure(reserve_bytes if decoder.device.type == "cpu" else 0)
        self.ends = frozenset(ends)
        self.vocabulary = decoder.embedding.rows
        self.wish = wish
        self.cache_tokens = cache_tokens
        self._new_cache(cache_tokens)
        self._costs = Costs()
        self._pace: tuple[int, float] | None = None  # tokens of the step under way and when it began, until it is noted
        self._is_full = False  # who waits longest cannot be admitted before somebody leaves
        self._new_text, self._spell = new_text, spell
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._cancelled: deque[Request] = deque()  # those that nobody has looked at; no lock is held to add one
        self._changed = threading.Condition()
        self._is_draining = False
        self._is_closed = False
        self._last_left = time.monotonic()
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, *, is_patient: bool = False) -> None:
        """Queue a request.

        Raises GenerationError when it can never be served or this is closed, and QueueFullError when too many wait
        already; who `is_patient` waits instead.
        """
        self._check(request.prompt)
        sampling = request.sampling
        room = min(len(request.prompt) + sampling.max_new_tokens, self.context)
        answer = Answer(request, Sampler(sampling, request.prompt), self._new_text(), StopStrings(sampling.stop), room)
        with self._changed:
            if is_patient:
                self._changed.wait_for(lambda: len(self._waiting) < self.wish.queue or self._takes_no_more)
            if self._takes_no_more:
                raise GenerationError("The model was unloaded.", hint="Load it again before asking.")
            if not self.cache.tokens:
                raise ResourceError(
                    "There is no KV cache: when it was cleared, memory ran out before it was made anew.",
                    hint="Free some memory and call clear_cache() again, or reload_model().",
                )
            if len(self._waiting) >= self.wish.queue:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, and no more may (engine.queue).",
                    hint="Ask again later, allow a longer queue, or more `streams` at once.",
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="loadstone-engine", daemon=True)
                thread.start()  # which fails where the system has no more
                self._thread = thread
            request.cancellations = self._cancelled
            self._waiting.append(answer)
            self._changed.notify_all()

    @property
    def idle_since(self) -> float | None:
        """When the last request ended, as time.monotonic() had it; None while one is waiting or running."""
        with self._changed:
            return None if self._waiting or self._running else self._last_left

    @property
    def _takes_no_more(self) -> bool:
        return self._is_closed or self._is_draining

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
        """Give the cache's memory back and begin an empty one; return False when requests are under way.

        Raises ResourceError when there is no memory for it: then no request is served until this succeeds.
        """
        with self._changed:
            if self._waiting or self._running or self._is_closed:
                return False
            self._new_cache(0)  # the old one goes first: there may not be memory for both
            with handle_exceptions("make the KV cache anew", into=GenerationError):
                self._new_cache(self.cache_tokens)
            return True

    def _new_cache(self, tokens: int) -> None:
        self.cache = self.decoder.new_cache(tokens)
        self.prefixes = PrefixCache(self.cache, is_on=self.wish.prefix_reuse)

    def save_prefixes(self, file: Path) -> int:
        """Write what the cache remembers to a file, when no request is under way any more; return its tokens."""
        with self._idle():
            return write_prefixes(file, self.prefixes, self.cache, self.decoder.identity())

    def load_prefixes(self, file: Path) -> int:
        """Remember what a file says, when no request is under way any more; return its tokens."""
        if not self.wish.prefix_reuse:
            raise GenerationError("No prefixes are reused, since engine.prefix_reuse is false.", hint="Set it to true.")
        with self._idle():
            return read_prefixes(file, self.prefixes, self.cache, self.decoder.identity())

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Wait until no request is waiting or running, and let none begin inside."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not (self._waiting or self._running))
            if self._is_closed:
                raise GenerationError("The model was unloaded.", hint="Load it again before asking.")
            yield

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
        del self.cache, self.prefixes, self.decoder

    def _check(self, prompt: Sequence[int]) -> None:
        length = len(prompt)
        if length == 0:
            raise GenerationError("The prompt is empty.", hint="Give at least one character, or a message.")
        if length >= self.context:
            raise ContextLengthError(length, self.context)
        unknown = [token for token in (min(prompt), max(prompt)) if not 0 <= token < self.vocabulary]
        if unknown:
            raise GenerationError(
                f"The prompt has token {unknown[0]}, and the model knows {self.vocabulary} tokens, from 0 on.",
                hint="The tokenizer is not the one that this model was made with: see its files.",
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._running:
                    self.width = self._widest
                self._changed.wait_for(lambda: self._is_closed or self._waiting or self._running)
                if self._is_closed:
                    return
                with self._failing_only(*islice(self._waiting, 1)):
                    self._admit()
            self._drop_cancelled()
            turn = self._turn()
            with self._failing_only(*turn):
                self._step(turn)
            with self._changed:
                self._changed.notify_all()

    def _admit(self) -> None:
        """Start waiting requests in their order, as long as the cache has room and there is a chunk to be read."""
        while self._waiting and not self._is_full and len(self._running) < self.width.together:
            answer = self._waiting[0]
            if answer.is_cancelled or not self._may_read(answer.request.prompt):
                return
            if self._running and self._pressure.is_felt():
                return
            answer.places = self.prefixes.begin(answer.request.prompt, answer.room)
            if answer.places is None:
                self._is_full = True
                return
            self._running.append(self._waiting.popleft())
            answer.read = answer.known = answer.places.known
            answer.started_at = time.perf_counter()
            if self.wish.speculation:
                answer.drafter = Drafter(answer.request.prompt)

    def _may_read(self, prompt: Sequence[int]) -> bool:
        """Tell whether a prompt may be read now: it would be soon, and none that is being read says the same first."""
        reading = [answer for answer in self._running if answer.is_reading]
        if sum(answer.unread for answer in reading) >= self.width.chunk:
            return False
        if not reading or not self.wish.prefix_reuse:
            return True
        known = self.prefixes.known(prompt)
        return all(common(prompt, answer.request.prompt) < known + KV_BLOCK for answer in reading)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        self._cancelled.clear()  # who is cancelled from here on is looked at in the next step
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
                    self._leave(answer, is_spoilt=True)
                    answer.request.line.put(error)

    def _turn(self) -> list[Answer]:
        """Return who is in the next step: all that are answering, and those who read, as far as a chunk goes."""
        turn = [answer for answer in self._running if not answer.is_reading][: self.width.together]
        left = self.width.chunk
        for answer in self._running:
            if answer.is_reading and left > 0:
                turn.append(answer)
                left -= answer.unread
        return turn

    def _step(self, turn: list[Answer]) -> None:
        if not turn:
            return
        is_decoding = not turn[-1].is_reading
        if is_decoding and self.width.guesses:
            self._draft(turn)
        ids: list[int] = []
        segments: list[Segment] = []
        left = self.width.chunk
        readers = [answer for answer in turn if answer.is_reading]
        for answer in turn:
            assert answer.places is not None  # it runs
            is_reading = answer.is_reading
            new, start, wanted = answer.turn(left)
            self.prefixes.reach(answer.places, start + len(new))
            left -= len(new) * is_reading
            ids.extend(new)
            segments.append(Segment(answer.places.block_table, start, len(new), wanted))
        started = time.perf_counter()
        try:
            logits = self.decoder.forward(ids, segments, self.cache)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self._step_down(error):
                raise
            for answer, one in zip(turn, segments, strict=True):
                answer.take_back(one.start)
            return
        self._pace = (len(ids), started) if is_decoding else None
        largest: list[int] | list[None] = [None] * len(logits)
        if any(answer.sampler.takes_largest and not answer.is_reading for answer in turn):
            largest = largest_tokens(logits)  # of all in one transfer
        if logits.is_cpu or largest[0] is not None:
            self._note_pace()
        for answer in readers:
            self._tell(answer)
        first = 0
        for answer, one in zip(turn, segments, strict=True):
            rows = slice(first, first + one.wanted)
            first = rows.stop
            if not answer.is_reading:
                with self._failing_only(answer):
                    self._take(answer, logits[rows], largest[rows])

    def _note_pace(self) -> None:
        """Take note of what a step took, once: when its logits are there, which on a GPU is when one was asked for."""
        if self._pace is not None:
            rows, started = self._pace
            self._pace = None
            self._costs.note(rows, time.perf_counter() - started)

    def _step_down(self, short: Exception) -> bool:
        """Let steps take less memory from now on, until nobody is under way; return False where they cannot."""
        narrower = self.width.narrower()
        if narrower is None:
            return False
        emit("generate.step_down", reason=str(short), was=str(self.width), now=str(narrower))
        self.width = narrower
        forget_frames(short)
        give_back()
        return True

    def _tell(self, answer: Answer) -> None:
        """Tell how far a prompt is read, when it takes more than one chunk."""
        total = len(answer.request.prompt)
        if total - answer.known > self.width.chunk:
            emit("generate.read", tokens=answer.read, of=total, seconds=time.perf_counter() - answer.started_at)

    def _draft(self, turn: list[Answer]) -> None:
        """Guess what each answer says next, as far as that is worth its time."""
        rows = len(turn)
        for answer in turn:
            if answer.drafter is not None:
                most = min(MOST, answer.room - answer.length - 1, LARGEST_STEP - rows)
                answer.drafts = answer.drafter.guess(most, self._costs, rows)
                rows += len(answer.drafts)

    def _take(self, answer: Answer, logits: torch.Tensor, largest: Sequence[int | None]) -> None:
        """Choose the next tokens of an answer, as long as guesses were right, and send what text they complete.

        `largest` has each row's token with the largest logit, where somebody takes it.
        """
        drafts, answer.drafts = answer.drafts, []
        answer.drafted += len(drafts)
        before = answer.accepted
        for row, best, draft in zip(logits, largest, [*drafts, None], strict=True):
            token = self._choose(answer, row, best)
            if len(answer.tokens) == 1:  # what the prompt came to was sound
                assert answer.places is not None
                self.prefixes.share(answer.places, answer.request.prompt)
            answer.accepted += token == draft
            if self._add(answer, token) or token != draft:
                break
        if answer.drafter is not None and drafts:
            answer.drafter.learn(len(drafts), answer.accepted - before)

    def _choose(self, answer: Answer, logits: torch.Tensor, largest: int | None) -> int:
        token = answer.sampler.choose(logits, largest)
        self._note_pace()
        if not answer.tokens:
            answer.first_token_at = time.perf_counter()
        answer.tokens.append(token)
        if answer.drafter is not None:
            answer.drafter.push(token)
        if (count := answer.request.sampling.logprobs) is not None:
            answer.logprobs.append(logprob_of(logits, token, count, self._spell))
        return token

    def _add(self, answer: Answer, token: int) -> bool:
        """Send what text a chosen token completes; return whether the answer ends with it."""
        if token in self.ends:
            self._finish(answer, "stop")
            return True
        text, is_stopped = answer.stop.push(answer.text.push(token))
        self._send(answer, text)
        if is_stopped:
            self._finish(answer, "stop")
        elif answer.length >= answer.room:
            self._finish(answer, "length")
        else:
            return False
        return True

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
        answer.request.line.put(Chunk("", answer.result(reason)))

    def _leave(self, answer: Answer, *, is_spoilt: bool = False) -> None:
        """Take an answer out and its places back; what it has in the cache is not to be used when `is_spoilt`."""
        with self._changed:  # or somebody finds nothing under way, and renews the cache, before its places are back
            if answer.places is None:
                self._waiting.remove(answer)
            else:
                self._running.remove(answer)
                self.prefixes.end(answer.places, [] if is_spoilt else answer.cached)
            self._is_full = False  # there are more places, or another one waits longest
            self._last_left = time.monotonic()
