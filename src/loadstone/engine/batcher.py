"""Runs requests together: each step of the decoder serves every sequence that is under way.

One thread owns the decoder and the cache. A request waits until the cache has room for all that it may need, first
come first served (`admission.py`); what its prompt shares with an earlier one is not read again, and the rest is read
in chunks, between the steps of those already answering (`steps.py`). Knows tokens and text pieces; nothing of
templates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from loadstone.config import EngineConfig
from loadstone.errors import ContextLengthError, GenerationError, QueueFullError, ResourceError, handle_exceptions
from loadstone.model import Decoder, KVCache

from .admission import Admission
from .answer import Answer
from .prefix_cache import PrefixCache
from .prefix_file import read_prefixes, write_prefixes
from .request import Request
from .sampling import Sampler
from .steps import Steps
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
        self.vocabulary = decoder.embedding.rows
        self.wish = wish
        self.cache_tokens = cache_tokens
        pressure = Pressure(reserve_bytes if decoder.device.type == "cpu" else 0)
        width = Width(chunk, guesses=wish.speculation)
        self.admission = Admission(self._new_prefixes(cache_tokens), width, pressure, wish)
        self._steps = Steps(decoder, self.admission, frozenset(ends), spell)
        self._new_text = new_text
        self._changed = self.admission.changed
        self._is_draining = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def prefixes(self) -> PrefixCache:
        """What divides the cache among sequences, and remembers what they leave there."""
        return self.admission.prefixes

    @property
    def cache(self) -> KVCache:
        """The KV cache."""
        return self.prefixes.cache

    # -- asking ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, *, is_patient: bool = False) -> None:
        """Queue a request.

        Raises GenerationError when it can never be served or this is closed, and QueueFullError when too many wait
        already; who `is_patient` waits instead.
        """
        self._check(request.prompt)
        sampling = request.sampling
        room = min(len(request.prompt) + sampling.max_new_tokens, self.context)
        sampler = Sampler(sampling, request.prompt, request.grammar)
        answer = Answer(request, sampler, self._new_text(), StopStrings(sampling.stop), room)
        waiting = self.admission.waiting
        with self._changed:
            if is_patient:
                self._changed.wait_for(lambda: len(waiting) < self.wish.queue or self._takes_no_more)
            self._check_open()
            if len(waiting) >= self.wish.queue:
                raise QueueFullError(
                    f"{len(waiting)} requests wait already, and no more may (engine.queue).",
                    hint="Ask again later, allow a longer queue, or more `streams` at once.",
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="loadstone-engine", daemon=True)
                thread.start()  # which fails where the system has no more
                self._thread = thread
            request.cancellations = self.admission.cancelled
            waiting.append(answer)
            self._changed.notify_all()

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

    def _check_open(self) -> None:
        if self._takes_no_more:
            raise _unloaded()
        if not self.cache.tokens:
            raise ResourceError(
                "There is no KV cache: when it was cleared, memory ran out before it was made anew.",
                hint="Free some memory and call clear_cache() again, or reload_model().",
            )

    @property
    def _takes_no_more(self) -> bool:
        return self._is_closed or self._is_draining

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        admission = self.admission
        while True:
            with self._changed:
                admission.widen()
                self._changed.wait_for(lambda: self._is_closed or not admission.is_idle)
                if self._is_closed:
                    return
                admission.mind_memory()
                with admission.failing_only(*islice(admission.waiting, 1)):
                    admission.admit()
            admission.drop_cancelled()
            turn = admission.turn()
            with admission.failing_only(*turn):
                self._steps.make(turn)
            with self._changed:
                self._changed.notify_all()

    # -- between answers ------------------------------------------------------------------------------------------

    @property
    def idle_since(self) -> float | None:
        """When the last request ended, as time.monotonic() had it; None while one is waiting or running."""
        with self._changed:
            return self.admission.idle_since

    def note_use(self) -> None:
        """Count as in use until now."""
        with self._changed:
            self.admission.note_use()

    def drain(self) -> None:
        """Take no more requests, and return when none is waiting or running."""
        with self._changed:
            self._is_draining = True
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Return when no request is waiting or running."""
        with self._changed:
            self._changed.wait_for(lambda: self.admission.is_idle)

    def renew_cache(self) -> bool:
        """Give the cache's memory back and begin an empty one; return False when requests are under way.

        Raises ResourceError when there is no memory for it: then no request is served until this succeeds.
        """
        with self._changed:
            if self._is_closed or not self.admission.is_idle:
                return False
            # The old one goes first: there may not be memory for both.
            self.admission.prefixes = self._new_prefixes(0)
            with handle_exceptions("make the KV cache anew", into=GenerationError):
                self.admission.prefixes = self._new_prefixes(self.cache_tokens)
            return True

    def _new_prefixes(self, tokens: int) -> PrefixCache:
        return PrefixCache(self.decoder.new_cache(tokens), is_on=self.wish.prefix_reuse)

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
            self._changed.wait_for(lambda: self._is_closed or self.admission.is_idle)
            if self._is_closed:
                raise _unloaded()
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
            self.admission.end_all(GenerationError("The model was unloaded while the answer was being made."))
        del self.admission.prefixes, self._steps, self.decoder


def _unloaded() -> GenerationError:
    return GenerationError(
        "This model was unloaded, and does not come back.",
        hint="Ask through its manager, as in manager.generate(…): it has the model that took this one's place, and "
        "loads one again that was let go of when idle. After unload_model() load it first.",
    )
