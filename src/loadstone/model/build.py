"""Plan + checkpoint → decoder: from the store where its weights are quantised already, else made and put there.

On the processor a decoder multiplies the store's file itself, whose memory every process that uses it shares.
Elsewhere, and where nothing can be kept, its parts are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loadstone.checkpoint import open_weights
from loadstone.checkpoint.spec import ModelSpec
from loadstone.errors import ModelLoadError
from loadstone.memory import give_back
from loadstone.planner import Plan
from loadstone.quantization import find_strategy
from loadstone.quantization.kernels.openmp import end_workers
from loadstone.store import Entry, Store, StoreUnavailableError
from loadstone.telemetry import emit

from .decoder import Decoder
from .keeping import Keeping
from .pack import pack, warn_of_numbers
from .recipe import Kept, Part, assemble, parts_of


def build(plan: Plan, spec: ModelSpec, store: Store | None = None, *, entry: Entry | None = None) -> Decoder:
    """Return the decoder that `plan` describes; `store` is where its weights are looked for and kept.

    `entry` is the one that has them, where that is known: the checkpoint's files are then not looked at.
    Emits `load.progress` while weights are read, `store.hit` or `store.made`, and warnings. Sets how many threads torch
    uses to what the plan says. Whatever it raises, nothing it made remains.
    """
    with _working(plan):
        if store is not None and can_be_kept(plan):
            try:
                return Keeping(plan, spec, store).decoder(entry)
            except StoreUnavailableError as error:
                reason = f"the quantised weights are not kept: {error}"
                emit("store.warning", reason=reason, file=str(store.folder), cause=str(error))
        return _build_in_memory(plan, spec)


def keep(plan: Plan, spec: ModelSpec, store: Store) -> tuple[Entry, bool]:
    """Make sure that `store` has the weights that `build` would take from it; build nothing.

    Returns their entry, and whether it was made now. Emits what `build` does, and raises ModelLoadError where they
    cannot be kept. Call it only for a plan that `can_be_kept`.
    """
    with _working(plan):
        try:
            return Keeping(plan, spec, store).entry()
        except StoreUnavailableError as error:
            raise ModelLoadError(
                f"{spec.name} in {plan.strategy} cannot be kept in {store.folder}: {error}",
                hint="Make room there (`loadstone cache prune`), or set store.folder to a folder that can be written.",
            ) from error


def can_be_kept(plan: Plan) -> bool:
    """Tell whether the plan's strategy has a form for the store on its device; "none" has not, nor has a plug-in's."""
    return find_strategy(plan.strategy).layout(plan.device.kind) is not None


@contextmanager
def _working(plan: Plan) -> Iterator[None]:
    if plan.settings.threads:
        torch.set_num_threads(plan.settings.threads)
    try:
        yield
    finally:
        end_workers()  # the thread that answers is another one


def _build_in_memory(plan: Plan, spec: ModelSpec) -> Decoder:
    kept: dict[str, Kept] = {}

    def take(part: Part, made: Kept, is_finite: bool) -> None:
        kept[part.name] = made
        if not is_finite:
            warn_of_numbers(part)

    with open_weights(spec) as weights:
        pack(plan, spec, parts_of(spec), weights, take)
    give_back()  # what packing left behind in the allocator
    return assemble(plan, spec, kept)
