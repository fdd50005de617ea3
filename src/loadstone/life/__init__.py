"""A model's time in memory: loaded, leased to requests, swapped for another, let go of when idle, given back."""

from .life import Life
from .loading import Loading
from .receipt import Footprint, Held, Receipt
from .trimming import MemoryReport, trimmed

__all__ = ["Footprint", "Held", "Life", "Loading", "MemoryReport", "Receipt", "trimmed"]
