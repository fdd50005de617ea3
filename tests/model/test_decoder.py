"""What a decoder refuses to compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from loadstone.model import Segment, table_of

TABLE = table_of([2, 0])  # 32 places


@pytest.mark.parametrize(
    ("segment", "why"),
    [
        (Segment(TABLE, 30, 3), "outside its sequence"),
        (Segment(TABLE, -1, 1), "outside its sequence"),
        (Segment(TABLE, 0, 0), "outside its sequence"),
        (Segment(TABLE, 0, 3, wanted=0), "no 0 tokens"),
        (Segment(TABLE, 0, 3, wanted=4), "no 4 tokens"),
    ],
)
def test_tokens_outside_a_sequence_are_refused(llama_folder: Path, segment: Segment, why: str) -> None:
    decoder, _, _ = tiny.load(llama_folder)
    with pytest.raises(ValueError, match=why):
        decoder.forward([1] * segment.length, [segment], decoder.new_cache(64))


def test_positions_beyond_the_context_are_refused(llama_folder: Path) -> None:
    decoder, _, plan = tiny.load(llama_folder)
    cache = decoder.new_cache(2 * plan.context)
    with pytest.raises(ValueError, match="context"):
        decoder.forward([1], [Segment(table_of(cache.take(cache.blocks)), plan.context, 1)], cache)
