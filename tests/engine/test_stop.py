"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.engine.stop import StopStrings
from loadstone.errors import ConfigurationError

# Two letters only, so that stop strings often occur, nearly occur, and overlap.
_TEXT = st.text("ab你", max_size=24)
_STOPS = st.lists(st.text("ab你", min_size=1, max_size=5), max_size=4).map(tuple)


def _whole(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    places = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(places)], True) if places else (text, False)


def _pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


@given(_TEXT, _STOPS, st.lists(st.integers(0, 100), max_size=24))
def test_cutting_changes_nothing(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    """Shown text and hit do not depend on where the pieces were cut."""
    watch = StopStrings(stops)
    shown = "".join(watch.push(piece)[0] for piece in _pieces(text, cuts)) + watch.flush()
    assert (shown, watch.hit) == _whole(text, stops)


@given(_TEXT, _STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop(text: str, stops: tuple[str, ...]) -> None:
    """What is held back begins as some stop string does, so it could still become one."""
    watch, shown = StopStrings(stops), ""
    for number, character in enumerate(text, 1):
        piece, hit = watch.push(character)
        shown += piece
        if hit:
            return
        held = text[len(shown) : number]
        assert not held or any(stop.startswith(held) for stop in stops)


@given(_TEXT, _STOPS)
def test_shown_text_is_never_taken_back(text: str, stops: tuple[str, ...]) -> None:
    """At each moment what was shown is a beginning of the final answer."""
    watch, shown = StopStrings(stops), ""
    for character in text:
        shown += watch.push(character)[0]
        assert _whole(text, stops)[0].startswith(shown)


def test_stop_is_said_with_the_piece_that_completes_it() -> None:
    """The work can end at once, not a token later."""
    watch = StopStrings(("<|end|>", "\n\n"))
    assert watch.push("好的<|en") == ("好的", False)
    assert watch.push("d|>更多") == ("", True)
    assert watch.push("more") == ("", True)
    assert watch.flush() == ""


def test_unfinished_stop_is_shown_at_the_end() -> None:
    """What only looked like a stop string is part of the answer."""
    watch = StopStrings(("User:",))
    assert watch.push("a User") == ("a ", False)
    assert watch.flush() == "User"
    assert not watch.hit


def test_no_stop_strings_hold_nothing_back() -> None:
    """Without stop strings text passes straight through."""
    assert StopStrings(()).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [("",), ("a", ""), "abc", (1,)])
def test_empty_or_foreign_stops_are_refused(stops: object) -> None:
    """An empty stop string would end every answer before it begins."""
    with pytest.raises(ConfigurationError):
        StopStrings(stops)  # type: ignore[arg-type]
