"""What was said so far, and how much of it a model can still read. Knows no model and no terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

Message = dict[str, str]
Count = Callable[[Sequence[Message]], int]


class Conversation:
    """A conversation under way: `messages` are all of it, `sent` is what the model is to read next."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: list[Message] = []
        self._first = 0  # the oldest message that is still sent

    @property
    def sent(self) -> list[Message]:
        """The system message, if any, and the messages that are not left out."""
        return [*self._opening(), *self.messages[self._first :]]

    def ask(self, text: str) -> None:
        """Add a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the model's answer."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        self.messages.pop()
        self._first = min(self._first, len(self.messages))

    def reset(self) -> None:
        """Forget all messages; the system message stays."""
        self.messages.clear()
        self._first = 0

    def fit(self, count: Count, limit: int) -> int:
        """Leave out the oldest questions with their answers until what is sent has at most `limit` tokens.

        The last question is never left out. Return how many messages were left out by this call.
        """
        before = self._first
        while count(self.sent) > limit:
            later = (
                index for index in range(self._first + 1, len(self.messages)) if self.messages[index]["role"] == "user"
            )
            following = next(later, None)
            if following is None:
                break
            self._first = following
        return self._first - before

    def save(self, file: Path, *, model: str, may_replace: bool) -> None:
        """Write all of it as JSON; raise OSError, FileExistsError too unless `may_replace`."""
        everything = {"model": model, "messages": [*self._opening(), *self.messages]}
        with open(file, "w" if may_replace else "x", encoding="utf-8") as stream:
            stream.write(json.dumps(everything, ensure_ascii=False, indent=2) + "\n")

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]
