"""What happens inside, as frozen events: progress bars, logs and metrics subscribe; nothing else prints."""

from .events import Event, Subscriber, emit, subscribe, timed
from .progress import Progress

__all__ = ["Event", "Progress", "Subscriber", "emit", "subscribe", "timed"]
