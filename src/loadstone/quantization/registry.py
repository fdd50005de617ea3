"""The strategies by name; plug-ins come in through the entry point group `loadstone.strategies`."""

from __future__ import annotations

from difflib import get_close_matches

from loadstone.errors import ConfigurationError
from loadstone.plugins import Door, made

from .base import Strategy

AUTO = "auto"  # not a strategy: the planner chooses one
ALIASES = {"nf4": "4bit", "int8": "8bit", "bf16": "none", "fp16": "none", "fp32": "none"}
STRATEGIES: Door[Strategy] = Door(
    "loadstone.strategies",
    {
        "none": "loadstone.quantization.none:NoQuantization",
        "8bit": "loadstone.quantization.int8:Int8",
        "4bit": "loadstone.quantization.nf4:Nf4",
        "int4": "loadstone.quantization.int4:Int4",
    },
    lambda name, found: made(found, Strategy, name),  # type: ignore[type-abstract]  # asked of, not made
)


def register_strategy(strategy: Strategy) -> None:
    """Make a strategy known under its name; the last registration of a name wins."""
    STRATEGIES.register(strategy.name, strategy)


def known_strategies() -> tuple[str, ...]:
    """Return the names that `find_strategy` takes, best quality first, then plug-ins."""
    return STRATEGIES.names()


def find_strategy(name: str) -> Strategy:
    """Return the strategy called `name` or one of its aliases.

    Raises ConfigurationError when there is none, or when the plug-in that has it is broken.
    """
    name = ALIASES.get(name, name)
    found = STRATEGIES.find(name)
    if found is not None:
        return found
    known = (*known_strategies(), *ALIASES, AUTO)
    near = get_close_matches(name, known, n=1)
    raise ConfigurationError(
        f"quantization {name!r} is not known",
        key="quantization",
        hint=(f"Did you mean {near[0]}? " if near else "") + f"Known are {', '.join(known)}.",
    )
