"""Memory that a model can do without between answers, given back step by step, with what each step gained."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loadstone.hardware import process_rss
from loadstone.loaded import LoadedModel
from loadstone.memory import device_memory, empty_device_caches, let_code_go, trim
from loadstone.units import format_size

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class MemoryReport(Mapping[str, int]):
    """What giving memory back gained, in bytes; as a mapping it has "before", "after" and each step's gain.

    `before` and `after` are resident memory, and on an accelerator what torch has there too. `steps` are "kv_cache"
    (keys, values, and what was remembered of earlier prompts), "store_pages" (weights mapped from the store, which come
    back when they are next needed), "garbage", "device_caches", "allocators" and "compiler" (LLVM's
    code, which is needed once). `is_busy` says that answers were under way, so that the KV cache had to stay.
    """

    before: int
    after: int
    steps: Mapping[str, int]
    is_busy: bool = False

    @property
    def freed(self) -> int:
        """All that was gained."""
        return sum(self.steps.values())

    def _all(self) -> dict[str, int]:
        return {BEFORE: self.before, AFTER: self.after, **self.steps}

    def __getitem__(self, name: str) -> int:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __str__(self) -> str:
        gained = ", ".join(f"{name.replace('_', ' ')} {format_size(size)}" for name, size in self.steps.items() if size)
        stayed = "; the KV cache stayed, for answers are under way" if self.is_busy else ""
        went = f"{format_size(self.before)} to {format_size(self.after)}"
        return f"Memory went from {went}: {gained or 'there was nothing to give back'}{stayed}."


def trimmed(model: LoadedModel | None, *, weights_too: bool) -> MemoryReport:
    """Give back what is not needed now; with `weights_too` also pages of weights that the store's file has."""
    before = size = _taken()
    gains: dict[str, int] = {}
    is_busy = False
    for name, step in _steps(model, weights_too=weights_too).items():
        is_busy |= step() is False
        left = _taken()
        gains[name] = max(0, size - left)
        size = left
    return MemoryReport(before, size, gains, is_busy)


def _steps(model: LoadedModel | None, *, weights_too: bool) -> dict[str, Callable[[], object]]:
    steps: dict[str, Callable[[], object]] = {}
    if model is not None:
        steps["kv_cache"] = model.engine.renew_cache
        if weights_too and model.decoder.attached is not None:
            steps["store_pages"] = model.decoder.attached.let_pages_go
    steps |= {"garbage": gc.collect, "device_caches": empty_device_caches, "allocators": trim}
    return steps | ({"compiler": let_code_go} if weights_too else {})


def _taken() -> int:
    return process_rss() + device_memory()[1]
