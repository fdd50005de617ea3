"""What happens inside, as frozen events: progress bars, logs and metrics subscribe; nothing else prints."""

from .events import Event, Subscriber, emit, subscribe, timed

__all__ = ["Event", "Subscriber", "emit", "subscribe", "timed"]
