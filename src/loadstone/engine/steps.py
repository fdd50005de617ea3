"""The steps of a decoder: what each answer brings to one, and what becomes of the logits that come of it.

One thread makes them. Knows answers and their tokens; who is in a step is the admission's to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from loadstone.errors import is_out_of_memory
from loadstone.memory import forget_frames, give_back
from loadstone.model import Decoder, Segment
from loadstone.planner.estimate import LARGEST_STEP
from loadstone.telemetry import emit

from .admission import Admission
from .answer import Answer
from .logprobs import logprob_of
from .sampling import largest_tokens
from .speculation import MOST, Costs


class Steps:
    """Makes steps on `decoder` for those whom `admission` has under way.

    `ends` are tokens that end an answer, and `spell` writes one token for people.
    """

    def __init__(
        self, decoder: Decoder, admission: Admission, ends: frozenset[int], spell: Callable[[int], str]
    ) -> None:
        self.decoder = decoder
        self._admission = admission
        self._ends, self._spell = ends, spell
        self._costs = Costs()
        self._pace: tuple[int, float] | None = None  # tokens of the step under way and when it began, until it is noted

    def make(self, turn: Sequence[Answer]) -> None:
        """Make one step for those whose turn it is, and send what comes of it."""
        if not turn:
            return
        is_decoding = not turn[-1].is_reading
        if is_decoding and self._admission.width.guesses:
            self._draft(turn)
        readers = [answer for answer in turn if answer.is_reading]
        ids, segments = self._brought(turn)
        started = time.perf_counter()
        try:
            logits = self.decoder.forward(ids, segments, self._admission.prefixes.cache)
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
                with self._admission.failing_only(answer):
                    self._take(answer, logits[rows], largest[rows])

    def _brought(self, turn: Sequence[Answer]) -> tuple[list[int], list[Segment]]:
        """Return the tokens that a step computes, and to whom they belong; each has the places for its own."""
        ids: list[int] = []
        segments: list[Segment] = []
        left = self._admission.width.chunk
        for answer in turn:
            assert answer.places is not None  # it runs
            is_reading = answer.is_reading
            new, start, wanted = answer.turn(left)
            self._admission.prefixes.reach(answer.places, start + len(new))
            left -= len(new) * is_reading
            ids.extend(new)
            segments.append(Segment(answer.places.block_table, start, len(new), wanted))
        return ids, segments

    def _draft(self, turn: Sequence[Answer]) -> None:
        """Guess what each answer says next, as far as that is worth its time."""
        rows = len(turn)
        for answer in turn:
            if answer.drafter is not None:
                most = min(MOST, answer.room - answer.length - 1, LARGEST_STEP - rows)
                answer.drafts = answer.drafter.guess(most, self._costs, rows)
                rows += len(answer.drafts)

    def _note_pace(self) -> None:
        """Take note of what a step took, once: when its logits are there, which on a GPU is when one was asked for."""
        if self._pace is not None:
            rows, started = self._pace
            self._pace = None
            self._costs.note(rows, time.perf_counter() - started)

    def _step_down(self, short: Exception) -> bool:
        """Let steps take less memory from now on, until nobody is under way; return False where they cannot."""
        if not self._admission.step_down(str(short)):
            return False
        forget_frames(short)
        give_back()
        return True

    def _tell(self, answer: Answer) -> None:
        """Tell how far a prompt is read, when it takes more than one chunk."""
        request, seconds = answer.request, time.perf_counter() - answer.started_at
        total = len(request.prompt)
        if total - answer.known > self._admission.width.chunk:
            emit("generate.read", request=request.id, tokens=answer.read, of=total, seconds=seconds)

    # -- from logits to text --------------------------------------------------------------------------------------

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
                self._admission.prefixes.share(answer.places, answer.request.prompt)
            answer.accepted += token == draft
            reason = answer.add(token, self._ends)
            if reason is not None:
                self._admission.finish(answer, reason)
            if reason is not None or token != draft:
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
