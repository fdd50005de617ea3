"""The strategies by name; plug-ins come in through the entry point group `loadstone.strategies`."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points

from loadstone.errors import ConfigurationError

from .base import Strategy

AUTO = "auto"  # not a strategy: the planner chooses one
ALIASES = {"nf4": "4bit", "int8": "8bit", "bf16": "none", "fp16": "none", "fp32": "none"}
_BUILT_IN = {
    "none": "loadstone.quantization.none:NoQuantization",
    "8bit": "loadstone.quantization.int8:Int8",
    "4bit": "loadstone.quantization.nf4:Nf4",
}
_registered: dict[str, Strategy] = {}


def register_strategy(strategy: Strategy) -> None:
    """Make a strategy known under its name; the last registration of a name wins."""
    _registered[strategy.name] = strategy


def known_strategies() -> tuple[str, ...]:
    """Return the names that `find_strategy` takes, best quality first, then plug-ins."""
    plugins = {entry.name for entry in entry_points(group="loadstone.strategies")} | set(_registered)
    return (*_BUILT_IN, *sorted(plugins - set(_BUILT_IN)))


def find_strategy(name: str) -> Strategy:
    """Return the strategy called `name` or one of its aliases; raise ConfigurationError when there is none."""
    name = ALIASES.get(name, name)
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        return _load(_BUILT_IN[name])
    for entry in entry_points(group="loadstone.strategies"):
        if entry.name == name:
            return _load(entry.value)
    known = (*known_strategies(), *ALIASES, AUTO)
    near = get_close_matches(name, known, n=1)
    raise ConfigurationError(
        f"quantization {name!r} is not known",
        key="quantization",
        hint=(f"Did you mean {near[0]}? " if near else "") + f"Known are {', '.join(known)}.",
    )


def _load(place: str) -> Strategy:
    module, _, attribute = place.partition(":")
    strategy = getattr(import_module(module), attribute)()
    if not isinstance(strategy, Strategy):
        raise ConfigurationError(f"{place} is not a quantization.Strategy", key="quantization")
    _registered[strategy.name] = strategy
    return strategy
