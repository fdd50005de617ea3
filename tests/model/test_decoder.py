"""What a decoder refuses to compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from loadstone.model import Segment


@pytest.mark.parametrize(
    ("segment", "why"),
    [
        (Segment(0, 60, 5), "cache"),
        (Segment(62, 0, 3), "cache"),
        (Segment(-1, 0, 1), "cache"),
        (Segment(0, 0, 0), "cache"),
    ],
)
def test_tokens_outside_the_cache_are_refused(llama_folder: Path, segment: Segment, why: str) -> None:
    decoder, _, _ = tiny.load(llama_folder)
    with pytest.raises(ValueError, match=why):
        decoder.forward([1] * segment.length, [segment], decoder.new_cache(64))


def test_positions_beyond_the_context_are_refused(llama_folder: Path) -> None:
    decoder, _, plan = tiny.load(llama_folder)
    with pytest.raises(ValueError, match="context"):
        decoder.forward([1], [Segment(0, plan.context, 1)], decoder.new_cache(2 * plan.context))
