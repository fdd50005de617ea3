"""Finds stop strings in text that comes in pieces, and keeps them from being seen.

Knows text only, not tokens. Holds back no more than what could still become a stop string.
"""

from __future__ import annotations

from loadstone.errors import ConfigurationError


class StopStrings:
    """Watches one answer for stop strings.

    The answer ends where the first stop string in the whole text begins, however the text was cut into
    pieces; of two that overlap, the one that begins earlier counts.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ConfigurationError(f"Stop strings must be texts that are not empty, not {stops!r}.", key="stop")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._hit = False

    @property
    def hit(self) -> bool:
        """Whether a stop string was found; after that nothing more comes out."""
        return self._hit

    def push(self, text: str) -> tuple[str, bool]:
        """Return what of the text may be shown now, and whether a stop string was found."""
        if self._hit:
            return "", True
        self._held += text
        begins, could_begin = self._first_stop(), self._first_beginning()
        # A stop string that is complete waits for one that began before it and may still complete.
        if begins is not None and begins <= could_begin:
            return self._end_at(begins), True
        shown, self._held = self._held[:could_begin], self._held[could_begin:]
        return shown, False

    def flush(self) -> str:
        """Return what was held back, now that no more text comes; `hit` says whether it had a stop string."""
        begins = None if self._hit else self._first_stop()
        if begins is not None:
            return self._end_at(begins)
        shown, self._held = self._held, ""
        return shown

    def _end_at(self, place: int) -> str:
        shown, self._held, self._hit = self._held[:place], "", True
        return shown

    def _first_stop(self) -> int | None:
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        return min(places, default=None)

    def _first_beginning(self) -> int:
        """Return where the earliest unfinished stop string begins, or the text's length."""
        length = len(self._held)
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, length), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return length - longest
