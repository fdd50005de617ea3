"""How a weight is kept and multiplied: the strategies, found by name."""

from .base import Strategy
from .registry import AUTO, STRATEGIES, find_strategy, known_strategies, register_strategy

__all__ = ["AUTO", "STRATEGIES", "Strategy", "find_strategy", "known_strategies", "register_strategy"]
