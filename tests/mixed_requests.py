"""Loads a model and asks it many different things at once; prints what came of it as one JSON line.

    python mixed_requests.py TASK

TASK is JSON: `config`, and how many `requests`. A refusal by ResourceError is an answer too.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WORDS = ["bonds", "stocks", "rates", "earnings", "risk", "value", "growth", "cash", "debt", "tax"]


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Return how many requests ended how, and the most memory at any time."""
    from loadstone import LoadstoneError, ModelManager, ResourceError

    peak = _Peak()
    manager = ModelManager(task["config"])
    try:
        manager.load()
    except ResourceError as error:
        return {"refused": str(error), **peak.end()}
    ended: Counter[str] = Counter()

    def ask(number: int) -> None:
        chance = random.Random(number)
        # Long prompts come close together, so that several are in work at once, and seldom, since they take long.
        words = 300 if number % 50 < 6 else chance.choice((5, 40))
        prompt = " ".join(chance.choices(WORDS, k=words))
        settings = {
            "max_new_tokens": chance.choice((1, 8, 24)),
            "temperature": chance.choice((0.0, 0.8)),
            "seed": number,
        }
        try:
            if number % 10 == 0:
                for _ in manager.stream(prompt, **settings):
                    break  # who asked goes away
                ended["left"] += 1
            else:
                ended[manager.generate(prompt, **settings).finish_reason] += 1
        except LoadstoneError as error:
            ended[type(error).__name__] += 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(task["requests"])))
    info = manager.get_model_info()
    manager.unload_model()
    return {"ended": dict(ended), "planned": info["planned_bytes"], **peak.end()}


class _Peak(threading.Thread):
    """Looks at this process's memory again and again: what is private, and what is mapped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._most = 0
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self._look()

    def _look(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        (resident,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
        self._most = max(self._most, resident)

    def end(self) -> dict[str, int]:
        self._over.set()
        self._look()
        return {"peak": self._most}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
