"""Who waits and who is under way: requests begin in their order, as soon as the cache has room for all they may need.

Knows answers, their places in the cache and how wide steps are now; nothing of the decoder.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from loadstone.config import EngineConfig
from loadstone.errors import GenerationError, LoadstoneError, handle_exceptions
from loadstone.hardware import process_rss
from loadstone.memory import forget_frames
from loadstone.planner.ladder import SMALLEST_CHUNK
from loadstone.quantization.kernels.words import KV_BLOCK
from loadstone.telemetry import emit
from loadstone.units import format_size

from .answer import Answer
from .prefix_cache import PrefixCache, common
from .request import Chunk, Request
from .speculation import Drafter
from .width import LOOK_S, Pressure, Width


class Admission:
    """The answers that wait and those under way, and their places in the cache that `prefixes` divides.

    `changed` guards the lists, and is told of each change; `admit` and whatever is said of answers under way belong to
    the thread that makes steps. `width` is how much a step may do now.
    """

    def __init__(self, prefixes: PrefixCache, width: Width, pressure: Pressure, wish: EngineConfig) -> None:
        self.prefixes = prefixes
        self.width = self._widest = width
        self._pressure = pressure
        self._wish = wish
        self.changed = threading.Condition()
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.cancelled: deque[Request] = deque()  # those that nobody has looked at; no lock is held to add one
        self._is_full = False  # who waits longest cannot be admitted before somebody leaves
        self._last_left = time.monotonic()
        self._stepped_down = 0.0  # when memory was last found short, and something given up for it

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits and nobody is under way."""
        return not (self.waiting or self.running)

    @property
    def idle_since(self) -> float | None:
        """When the last request ended, as time.monotonic() had it; None while one is waiting or running."""
        return self._last_left if self.is_idle else None

    def note_use(self) -> None:
        """Count as in use until now; the lock is held."""
        self._last_left = time.monotonic()

    def widen(self) -> None:
        """Let steps be as wide as ever where nobody is under way; the lock is held."""
        if not self.running:
            self.width = self._widest

    def admit(self) -> None:
        """Start waiting requests in their order, as long as the cache has room and there is a chunk to be read."""
        while self.waiting and not self._is_full and len(self.running) < self.width.together:
            answer = self.waiting[0]
            if answer.is_cancelled or not self._may_read(answer):
                return
            if self.running and self._pressure.is_felt():
                return
            answer.places = self.prefixes.begin(answer.request.prompt, answer.room)
            if answer.places is None:
                self._is_full = True
                return
            self.running.append(self.waiting.popleft())
            answer.read = answer.known = answer.places.known
            answer.started_at = time.perf_counter()
            if self._wish.speculation:
                answer.drafter = Drafter(answer.request.prompt, answer.request.grammar)

    def _may_read(self, answer: Answer) -> bool:
        """Tell whether a prompt may be read now: it would be soon, and none that is being read says the same first."""
        reading = [one for one in self.running if one.is_reading]
        if sum(one.unread for one in reading) >= self.width.chunk:
            return False
        if not reading or not self._wish.prefix_reuse:
            return True
        prompt = answer.request.prompt
        known = self.prefixes.known(prompt)
        return all(common(prompt, one.request.prompt) < known + KV_BLOCK for one in reading)

    def turn(self) -> list[Answer]:
        """Return who is in the next step: all that are answering, and those who read, as far as a chunk goes."""
        turn = [answer for answer in self.running if not answer.is_reading][: self.width.together]
        left = self.width.chunk
        for answer in self.running:
            if answer.is_reading and left > 0:
                turn.append(answer)
                left -= answer.unread
        return turn

    # -- memory that is short -------------------------------------------------------------------------------------

    def mind_memory(self) -> None:
        """Where little is left of the machine's memory, go a step down: known prefixes go first, then chunks shrink."""
        if self._pressure.is_felt() and time.monotonic() - self._stepped_down > LOOK_S:
            self.step_down(str(self._pressure), may_narrow=self.width.chunk > SMALLEST_CHUNK)

    def step_down(self, reason: str, *, may_narrow: bool = True) -> bool:
        """Give up what is remembered of earlier texts, or if that is nothing let steps take less until all have left.

        Returns False where there is neither.
        """
        self._stepped_down = time.monotonic()
        was, now = self._forget() or (str(self.width), None)
        if now is None:
            narrower = self.width.narrower() if may_narrow else None
            if narrower is None:
                return False
            self.width, now = narrower, str(narrower)
        emit("generate.step_down", reason=reason, was=was, now=now)
        return True

    def _forget(self) -> tuple[str, str] | None:
        """Give back the memory of places that no answer under way needs; return what was known, and what that gained.

        None where it was nothing, or where the system does not take it.
        """
        if not self.prefixes.cache.can_give_pages_back:
            return None
        before, known = process_rss(), self.prefixes.forget()
        if not self.prefixes.cache.give_pages_back():
            return None
        return f"{known} known tokens", f"none, which gave back {format_size(max(0, before - process_rss()))}"

    # -- the end of an answer -------------------------------------------------------------------------------------

    def drop_cancelled(self) -> None:
        """Finish the answers that nobody wants any more."""
        if not self.cancelled:
            return
        self.cancelled.clear()  # who is cancelled from here on is looked at in the next step
        with self.changed:
            dropped = [answer for answer in (*self.running, *self.waiting) if answer.is_cancelled]
        for answer in dropped:
            with self.failing_only(answer):
                self.finish(answer, "cancelled")

    def finish(self, answer: Answer, reason: str) -> None:
        """Send what was held back and the result, and give the places in the cache back."""
        reason = answer.flush(reason)
        self._leave(answer)
        answer.request.line.put(Chunk("", answer.result(reason)))

    @contextmanager
    def failing_only(self, *answers: Answer) -> Iterator[None]:
        """Give whatever is raised inside to those who wait for `answers`, and let the thread go on."""
        try:
            with handle_exceptions("make the answer", into=GenerationError):
                yield
        except LoadstoneError as error:
            forget_frames(error)
            for answer in answers:
                if answer in self.running or answer in self.waiting:
                    self._leave(answer, is_spoilt=True)
                    answer.request.line.put(error)

    def _leave(self, answer: Answer, *, is_spoilt: bool = False) -> None:
        """Take an answer out and its places back; what it has in the cache is not to be used when `is_spoilt`."""
        with self.changed:  # or somebody finds nothing under way, and renews the cache, before its places are back
            if answer.places is None:
                self.waiting.remove(answer)
            else:
                self.running.remove(answer)
                self.prefixes.end(answer.places, [] if is_spoilt else answer.cached)
            self._is_full = False  # there are more places, or another one waits longest
            self._last_left = time.monotonic()

    def end_all(self, error: GenerationError) -> None:
        """Give an error to everybody; the lock is held, and no step is under way."""
        for answer in (*self.running, *self.waiting):
            answer.request.line.put(error)
        self.waiting.clear()
        self.running.clear()
        self.changed.notify_all()
