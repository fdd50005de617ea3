"""Wishes and facts in, a plan out: what will fit, decided by arithmetic before any weight is read."""

from .estimate import Estimate
from .plan import Plan, plan

__all__ = ["Estimate", "Plan", "plan"]
