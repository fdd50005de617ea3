"""Warnings of the log, in words for a person."""

from __future__ import annotations

import pytest

from loadstone.cli import logs
from loadstone.telemetry import Event
from loadstone.telemetry.log import log_event


@pytest.mark.parametrize(("count", "said"), [(1, "(t0)"), (3, "(t0, t1, t2)"), (5, "(t0, t1, t2 and 2 more)")])
def test_a_warning_names_its_first_tensors(capsys, count, said):
    """Whoever has broken weights learns which; of many, the first few and how many more."""
    logs.configure(None)
    log_event(Event("load.warning", {"reason": "weights hold NaN", "tensors": [f"t{n}" for n in range(count)]}))
    assert capsys.readouterr().err == f"warning: weights hold NaN {said}\n"
