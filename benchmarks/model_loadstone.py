"""Loadstone, opened for `benchmarks.decode` and `benchmarks.batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .answers import Answer
from .weights import read_per_token

if TYPE_CHECKING:
    from loadstone import GenerationResult, ModelManager


def open_model(settings: Mapping[str, Any]) -> LoadstoneModel:
    """Load with the sections of the configuration that `settings` has as `config`; `is_chat` says how it is asked."""
    from loadstone import ModelManager

    manager = ModelManager(settings["config"])
    manager.load()
    return LoadstoneModel(manager, is_chat=settings.get("is_chat", False))


class LoadstoneModel:
    """A manager whose model is loaded; it is asked texts as they are, or messages of a chat.

    Always the likeliest token is taken, and no penalty changes which one that is.
    """

    def __init__(self, manager: ModelManager, *, is_chat: bool) -> None:
        self._manager = manager
        self._is_chat = is_chat

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        return _answer(self._manager.generate(text, raw=not self._is_chat, **_greedy(tokens)))

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Return the answers of one batch."""
        return [
            _answer(one)
            for one in self._manager.generate_batch(texts, raw=not self._is_chat, **_greedy(tokens))
        ]  # fmt: skip

    def read_per_token(self) -> int:
        """Return the bytes of weights that one token needs."""
        return read_per_token(self._manager.get_model_info()["bytes"])


def _greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": tokens}


def _answer(result: GenerationResult) -> Answer:
    if result.error is not None:
        raise result.error
    usage, timing = result.usage, result.timing
    # Versions without a feature have no count of what it did.
    cached, drafted, accepted = (
        getattr(usage, f"{name}_tokens", None) for name in ("cached", "drafted", "accepted")
    )  # fmt: skip
    return Answer(
        usage.prompt_tokens, usage.completion_tokens, timing.first_token_s, timing.total_s, cached, drafted, accepted,
        result.text,
    )  # fmt: skip
