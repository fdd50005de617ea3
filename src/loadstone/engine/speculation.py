"""Guesses what an answer says next, so that several tokens are computed in one step, which costs little more than one.

A guess is what followed the same few tokens before, in the prompt or in the answer (prompt lookup decoding, Saxena
2023). The sampler then chooses token by token as it would have without: a guess that it does not choose ends the step,
so answers are the same, only sooner. Knows tokens and times, nothing of text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from loadstone.model.batch import FEW_TOKENS

from ._llguidance import Grammar

LENGTHS = (3, 2)  # of what is looked up, the longest first
NOWHERE = -1  # in place of where a run ends
LEAST_BITS = 8  # of the place in a table of runs
MOST = FEW_TOKENS - 1  # tokens guessed at once: with the one before them they are still few
COUNTS = (1, 2, 3, 5, 7, 11, MOST)
PRIOR = 0.5  # the acceptance rate before anything is known
WEIGHT = 0.2  # of the newest observation, in running means
RETURN = 0.01  # how far the rate goes back to PRIOR with each guess that is not tried, so that it is tried again
KEPT = 128  # steps for which a measurement counts: other work may have disturbed it, and texts get longer and shorter
COST_A_ROW = 0.15  # of a step's time, for each more token in it, before it is measured


class Runs:
    """Where each run of `length` tokens came last in a text, but for the run at its end.

    A table by hash, and chains through runs whose hash is the same: 8 to 12 bytes a token, where a dict takes over 100.
    """

    def __init__(self, text: array[int], length: int) -> None:
        self._text, self._length = text, length
        self._build()

    def take(self) -> None:
        """Take the run at the text's end, which is about to get longer."""
        if len(self._text) >= len(self._last):
            self._build()
        if len(self._text) >= self._length:
            self._take(tuple(self._text[-self._length :]))

    def find(self) -> int | None:
        """Return where the run at the text's end ended before, the last time; None where it did not come before."""
        length, text = self._length, self._text
        wanted = text[-length:]
        end = self._last[hash(tuple(wanted)) & (len(self._last) - 1)]
        while end != NOWHERE:
            if text[end - length : end] == wanted:
                return end
            end = self._before[end]
        return None

    def _build(self) -> None:
        """Make the table, a power of two larger than the text, and take all runs but the one at the text's end."""
        text, length = self._text, self._length
        self._last = array("i", [NOWHERE]) * (1 << max(len(text).bit_length(), LEAST_BITS))
        self._before = array("i", [NOWHERE]) * length  # no run ends as early
        for run in zip(*(text[start:-1] for start in range(length)), strict=False):
            self._take(run)

    def _take(self, run: tuple[int, ...]) -> None:
        place = hash(run) & (len(self._last) - 1)
        end = len(self._before)
        self._before.append(self._last[place])
        self._last[place] = end


class Drafter:
    """The guesses for one answer; where its `grammar` leaves one way to go on, they are no guesses."""

    def __init__(self, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        self._tokens = array("i", prompt)
        self._grammar = grammar
        self._is_sure = False
        self._runs = [Runs(self._tokens, length) for length in LENGTHS]
        self._acceptance = PRIOR

    def push(self, token: int) -> None:
        """Take a token of the text; what it follows is remembered."""
        for runs in self._runs:
            runs.take()
        self._tokens.append(token)

    def guess(self, most: int, costs: Costs, rows: int) -> list[int]:
        """Return up to `most` tokens that are worth computing in a step that has `rows` tokens without them."""
        sure = self._grammar.sure() if self._grammar is not None else []
        self._is_sure = bool(sure)
        if sure:
            return sure[: _worth(min(most, len(sure)), 1.0, costs, rows)]
        start = self._found()
        if start is None or most <= 0:
            return []
        count = _worth(most, self._acceptance, costs, rows)
        if count == 0:
            self._acceptance += RETURN * (PRIOR - self._acceptance)
        period = len(self._tokens) - start  # where the text is at its end, it began to repeat itself
        guess = [self._tokens[start + j % period] for j in range(count)]
        return guess if self._grammar is None else guess[: self._grammar.fitting(guess)]

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the tokens guessed were right."""
        if self._is_sure:
            return
        tried = min(drafted, accepted + 1)  # what comes after a wrong one says nothing
        for number in range(tried):
            self._acceptance += WEIGHT * ((number < accepted) - self._acceptance)

    def _found(self) -> int | None:
        """Return the place of what followed the latest tokens before, looking for the longest first."""
        for runs in self._runs:
            if (end := runs.find()) is not None:
                return end
        return None


class Costs:
    """How long a step of so many tokens takes, in seconds, as far as it was measured lately."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # what was measured longest ago comes first
        self._noted: dict[int, int] = {}  # at which step
        self._begun: set[int] = set()
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """Take note of a step."""
        if rows not in self._begun:  # the first step of its size makes what the others use again
            self._begun.add(rows)
            return
        before = self._seconds.pop(rows, seconds)
        self._seconds[rows] = before + WEIGHT * (seconds - before)
        self._noted[rows] = self._steps = self._steps + 1
        oldest = next(iter(self._seconds))
        if self._steps - self._noted[oldest] > KEPT:
            del self._seconds[oldest]

    def of(self, rows: int) -> float:
        """Return the seconds of a step, from the nearest that were measured; relative ones where none was."""
        known = self._seconds
        if rows in known:
            return known[rows]
        below = max((one for one in known if one < rows), default=None)
        above = min((one for one in known if one > rows), default=None)
        if below is not None and above is not None:
            return known[below] + (known[above] - known[below]) * (rows - below) / (above - below)
        nearest = below if below is not None else above
        if nearest is None:
            return _relative(rows)
        return known[nearest] * _relative(rows) / _relative(nearest)


def _worth(most: int, acceptance: float, costs: Costs, rows: int) -> int:
    """Return how many more tokens, up to `most`, make a step of `rows` fastest, each right with this chance."""
    best, count = rows / costs.of(rows), 0  # tokens a second
    for drafts in COUNTS:
        if drafts > most:
            break
        expected = rows + sum(acceptance**j for j in range(1, drafts + 1))
        if (speed := expected / costs.of(rows + drafts)) > best:
            best, count = speed, drafts
    return count


def _relative(rows: int) -> float:
    return 1.0 + COST_A_ROW * (rows - 1)
