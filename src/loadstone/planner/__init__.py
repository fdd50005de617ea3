"""Wishes and facts in, a plan out: what will fit, decided by arithmetic before any weight is read."""

from .deciding import plan
from .estimate import Estimate
from .ladder import Below
from .machines import Machine, find_machine, known_machines
from .plan import Plan
from .runtime import runtime_bytes
from .speed import Expected, expect

__all__ = [
    "Below",
    "Estimate",
    "Expected",
    "Machine",
    "Plan",
    "expect",
    "find_machine",
    "known_machines",
    "plan",
    "runtime_bytes",
]
