"""Plan + checkpoint → decoder: from the store where its weights are quantised already, else made and put there.

On the processor a decoder multiplies the store's file itself, whose memory every process that uses it shares.
Elsewhere, and where nothing can be kept, its parts are its own.
"""

from __future__ import annotations

import torch

from loadstone.checkpoint import open_weights
from loadstone.checkpoint.spec import ModelSpec
from loadstone.planner import Plan
from loadstone.quantization import find_strategy
from loadstone.quantization.kernels.openmp import end_workers
from loadstone.store import Store, StoreUnavailableError
from loadstone.telemetry import emit

from .decoder import Decoder
from .keeping import Keeping
from .pack import pack, warn_of_numbers
from .recipe import Kept, Part, assemble, parts_of


def build(plan: Plan, spec: ModelSpec, store: Store | None = None) -> Decoder:
    """Return the decoder that `plan` describes; `store` is where its weights are looked for and kept.

    Emits `load.progress` while weights are read, `store.hit` or `store.made`, and warnings. Sets how many threads torch
    uses to what the plan says. Whatever it raises, nothing it made remains.
    """
    if plan.settings.threads:
        torch.set_num_threads(plan.settings.threads)
    try:
        if store is not None and find_strategy(plan.strategy).layout(plan.device.kind) is not None:
            try:
                return Keeping(plan, spec, store).decoder()
            except StoreUnavailableError as error:
                emit("store.warning", reason=f"the quantised weights are not kept: {error}", file=str(store.folder))
        return _build_in_memory(plan, spec)
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
    return assemble(plan, spec, kept)
