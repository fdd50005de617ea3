"""A model on its way out: what it took before, what is there after, and who holds what did not go."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loadstone.folders import cache_folder
from loadstone.hardware import peak_rss, process_rss
from loadstone.loaded import LoadedModel
from loadstone.memory import give_back, let_code_go, trim
from loadstone.planner.accuracy import add_record
from loadstone.telemetry import timed

from .holders import UNKNOWN, Search
from .pieces import Piece, footprint, pieces_of
from .receipt import Held, Receipt
from .tenure import Tenure

if TYPE_CHECKING:  # brings torch
    import torch

MOST_HELD = 4  # things whose holders are looked for
SECONDS_TO_LOOK = 0.5


def retire(tenure: Tenure, *, reason: str, cancel: bool = False) -> Receipt:
    """Empty a model that no call can find any more, and return what came of it.

    Answers under way are finished first, or with `cancel` ended with GenerationError.
    """
    model = tenure.model
    assert model is not None  # it goes once
    leaving = Retiring(model)
    with timed("unload", model=leaving.name, reason=reason) as told:
        try:
            if not cancel:
                tenure.wait_for_leases()
                model.engine.drain()
        finally:  # also when Ctrl-C ends the wait
            leaving.remember(model)
            tenure.model = None
            tenure.close()
            model.release()
            del model
            give_back()
            let_code_go()
        receipt = leaving.receipt()
        told |= {"freed": receipt.freed.resident, "held": receipt.held_bytes}
    return receipt


class Retiring:
    """Looks at a model before it is let go of, and keeps nothing of it."""

    def __init__(self, model: LoadedModel) -> None:
        self.name = model.spec.name
        self._started = time.perf_counter()
        self._pieces = pieces_of(model)
        self._before = footprint(self._pieces)
        # Each is held by the one before it.
        self._shells = [weakref.ref(one) for one in (model, model.engine, model.decoder)]

    def remember(self, model: LoadedModel) -> None:
        """Write down what the process has and had beside the model, which later plans learn from."""
        record = model.record
        if record is None or model.plan.device.kind != "cpu":
            return
        now, peak = footprint(self._pieces), peak_rss()
        model_bytes = now.resident - now.other  # pages of weights and cache only come as answers are made
        most = max(now.other, peak - model_bytes) if peak > record.process_peak else now.other
        trim()  # what steps have left in the allocator was planned for as theirs
        add_record(cache_folder(), replace(record, beside=most, idle=now.other - max(0, now.resident - process_rss())))

    def receipt(self) -> Receipt:
        """Return what came of it; call when nobody should have the model any more."""
        search = Search(seconds=SECONDS_TO_LOOK)
        held = (*_held(self._pieces, search), *self._shell(search))
        after = footprint(self._pieces)
        return Receipt(self.name, self._before, after, time.perf_counter() - self._started, held)

    def _shell(self, search: Search) -> list[Held]:
        """Return who has the emptied model, its engine or its decoder."""
        for reference in self._shells:
            if (one := reference()) is not None:
                return [Held(type(one).__name__, 0, search.holders(one))]
        return []


def _held(pieces: Sequence[Piece], search: Search) -> list[Held]:
    """Return the pieces that are still there, largest first, and what they are beyond a few in one sum."""
    alive = sorted((one for one in pieces if one.is_alive), key=lambda one: -one.nbytes)
    if not alive:
        return []
    tensors = _tensors({one.storage.cdata for one in alive[:MOST_HELD]}, search)
    told = [Held(one.name, one.nbytes, _holders_of(tensors[one.storage.cdata], search)) for one in alive[:MOST_HELD]]
    if rest := alive[MOST_HELD:]:
        told.append(Held(f"{len(rest)} more", sum(one.nbytes for one in rest), ("unknown: not looked for",)))
    return told


def _tensors(storages: set[int], search: Search) -> dict[int, list[object]]:
    """Return the tensors that Python has of each of these storages."""
    import torch

    found: dict[int, list[object]] = {storage: [] for storage in storages}
    for mine in (found, *found.values()):
        search.skip(mine)
    for one in gc.get_objects():
        # By type(): isinstance would ask objects of foreign libraries for their __class__.
        if issubclass(type(one), torch.Tensor) and (storage := _storage_of(one)) in found:
            found[storage].append(one)
    return found


def _storage_of(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # some kinds of tensors have none
        return 0


def _holders_of(tensors: list[object], search: Search) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for one in tensors:
        names |= dict.fromkeys(search.holders(one))
    known = [name for name in names if not name.startswith("unknown")]
    return tuple(known or names) or (UNKNOWN,)
