"""What a decoder refuses to compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from loadstone.model import Segment, block_table_of

LATER = {"rope_type": "default", "rope_theta": 20000.0}
TABLE = block_table_of([2, 0])  # 32 places


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
        decoder.forward([1], [Segment(block_table_of(cache.take(cache.blocks)), plan.context, 1)], cache)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"sliding_window": 20}, {"rope_parameters": LATER}])
def test_decoders_whose_keys_and_values_differ_are_told_apart(change: dict[str, Any], tmp_path: Path) -> None:
    """Even if their weights are the same."""
    folder = tiny.write(tmp_path, "mistral", sliding_window=17)
    first, again = (tiny.load(folder)[0].identity() for _ in range(2))
    assert first == again
    tiny.rewrite_config(folder, **change)
    assert tiny.load(folder)[0].identity() != first
