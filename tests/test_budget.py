"""`max_memory` is a promise: whatever is asked, the process stays within it, and where it cannot, it says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from within import run_within

MB = 10**6
SCRIPT = Path(__file__).parent / "mixed_requests.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits that the kernel holds are Linux's here")


def serve(budget: int, requests: int, **wish: Any) -> dict[str, Any]:
    """Load the bundled model within a budget that the kernel holds too, and ask it; return what came of it."""
    config = {"model_config": {"base_model": "smollm2", "max_memory": budget, **wish}}
    done = run_within(budget, SCRIPT, {"config": config, "requests": requests})
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_200_mixed_requests_stay_within_the_budget() -> None:
    budget = 900 * MB
    found = serve(budget, 200, context=1024, streams=4)
    assert sum(found["ended"].values()) == 200
    assert set(found["ended"]) <= {"stop", "length", "left"}
    assert found["peak"] <= budget


@pytest.mark.parametrize("budget", [2000, 800, 700, 650, 600, 550, 500, 450, 400, 300])
def test_every_budget_gives_answers_or_a_refusal(budget: int) -> None:
    found = serve(budget * MB, 20, streams=4, quantization="auto")
    assert found["peak"] <= budget * MB
    assert "refused" in found or sum(found["ended"].values()) == 20
