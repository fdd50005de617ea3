"""A model for the length of a command: loaded with its progress shown, unloaded at the end whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.units import format_size

from .interrupts import HeldInterrupts
from .listening import heard
from .output import Row
from .progress import KEEPING, shown_progress

if TYPE_CHECKING:
    from loadstone.config import ConfigManager
    from loadstone.loaded import LoadedModel
    from loadstone.manager import ModelManager
    from loadstone.telemetry import Event


@dataclass(frozen=True)
class Ready:
    """A loaded model, the seconds that its load took, and what it takes in bytes.

    `weights_from` says where its weights came from, for people; it is empty where they are as they are in the files.
    """

    model: LoadedModel
    load_s: float
    weights_bytes: int
    kv_bytes: int
    weights_from: str = ""


@contextmanager
def loaded(configuration: ConfigManager) -> Iterator[Ready]:
    """Load the configured model and yield it; unload it at the end, ending what it still answers."""
    with shown_progress("Starting"):
        with HeldInterrupts():
            from loadstone.manager import ModelManager

    with ExitStack() as at_the_end:
        manager = ModelManager(configuration)
        at_the_end.callback(_unload, manager)
        started = time.perf_counter()
        with heard("store.hit", "store.keeping", "store.warning") as events, shown_progress("Looking at the model"):
            model = manager.load()
        load_s = time.perf_counter() - started
        weights = sum(model.decoder.weight_bytes().values())
        yield Ready(model, load_s, weights, model.engine.cache_bytes, _weights_from(model, events))


def _unload(manager: ModelManager) -> None:
    """Unload; where quantised weights must first be written to the store, show how far that is."""
    is_waiting = manager.is_loaded() and not manager.load().decoder.is_settled
    with shown_progress(KEEPING) if is_waiting else nullcontext():
        manager.unload_model(cancel=True)


def _weights_from(model: LoadedModel, events: Sequence[Event]) -> str:
    from loadstone.model import can_be_kept

    names = {event.name for event in events}
    if "store.hit" in names:
        return "from the store"
    if "store.keeping" in names:
        return "quantised, and kept for the next time"
    if not can_be_kept(model.plan):
        return ""
    causes = [event.fields["cause"] for event in events if "cause" in event.fields]
    return f"quantised, not kept: {causes[-1] if causes else 'the store is switched off'}"


def facts(ready: Ready) -> list[Row]:
    """Return what a person should know of a load: where, how, in how much memory and time."""
    plan = ready.model.plan
    device = plan.device
    forced = ", forced" if plan.forced else ""
    return [
        ("device", f"{device.torch_name}: {device.name} ({device.reason})"),
        ("strategy", f"{plan.strategy}{forced}"),
        (
            "memory",
            f"weights {format_size(ready.weights_bytes)}, KV cache {format_size(ready.kv_bytes)} "
            f"for {plan.context} tokens",
        ),
        ("load", f"{ready.load_s:.2f} s" + (f", {ready.weights_from}" if ready.weights_from else "")),
    ]
