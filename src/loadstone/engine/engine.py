"""A model that answers: prompts and conversations in, chunks and results out.

Knows the tokenizer, the chat template and what sampling is in force; leaves the work to the batcher.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadstone.checkpoint.template import ChatTemplate
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import CONSTRAINTS, EngineConfig, Sampling
from loadstone.errors import ConfigurationError
from loadstone.model import Decoder, KVCache
from loadstone.planner import Plan

from ._llguidance import Grammar, Grammars
from .batcher import Batcher
from .request import GenerationResult, Request, Stream, Timing, Usage
from .text import TextStream
from .tools import Tool, Tools, offered, with_calls

Prompt = str | Sequence[Mapping[str, Any]]


class Engine:
    """Answers on one decoder; safe to use from many threads, whose requests run together.

    A text prompt goes through the chat template when the model has one, as one message of the user; `raw` sends
    it as it is. A sequence of role/content mappings is a conversation.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None, plan: Plan,
        wish: EngineConfig | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.template = template
        self.context = plan.context
        self._batcher = Batcher(
            decoder,
            context=plan.context,
            cache_tokens=plan.cache_tokens,
            chunk=plan.settings.prefill_chunk,
            ends=tokenizer.eos_token_ids,
            new_text=lambda: TextStream(tokenizer),
            spell=lambda token: tokenizer.decode([token], skip_special_tokens=False),
            wish=wish or EngineConfig(),
            reserve_bytes=plan.activation_bytes,
        )
        self._grammars = Grammars(tokenizer, decoder.embedding.rows, tokenizer.eos_token_ids)
        self.cache_bytes = self._batcher.cache.nbytes  # of the KV cache when it is full
        # Nobody asks an engine that nobody holds. And a thread that outlives the interpreter is torn down inside
        # C++ code, which aborts the process: this is also called at exit.
        weakref.finalize(self, self._batcher.close)

    def encode(
        self, prompt: Prompt, *, raw: bool = False, system: str | None = None, tools: Tools | None = None
    ) -> list[int]:
        """Return the tokens that the model will read for a prompt, and for the functions that it is told of.

        Raises ConfigurationError for what is neither a text nor a conversation, or contradicts `raw`.
        """
        if raw and (system is not None or tools is not None or not isinstance(prompt, str)):
            raise ConfigurationError(
                "raw=True sends one text as it is, without a system message, a conversation or tools.",
                hint="Leave raw out, or write the whole prompt as one text.",
            )
        if isinstance(prompt, str) and (raw or (self.template is None and system is None)):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        messages = _conversation(prompt, system)
        if self.template is None:
            text = "\n".join(str(message.get("content", "")) for message in messages)
            return self.tokenizer.encode(text, add_special_tokens=True)
        text = self.template.render(messages, tools=[*tools.definitions] if tools is not None else None)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def offer(self, tools: Sequence[Tool] | None, tool_choice: str, sampling: Sampling) -> Tools | None:
        """Return the functions that a call offers, or None; raises ConfigurationError where they cannot be meant."""
        found = offered(tools, tool_choice, self.template)
        said = next((name for name in CONSTRAINTS if getattr(sampling, name)), None)
        if found is not None and said is not None:
            raise ConfigurationError(
                f"An answer that follows {said} cannot call functions, and one that calls functions cannot follow it",
                key="tools",
                hint='Leave one of them out, or say tool_choice="none".',
            )
        return found

    def stream(
        self, prompt: Prompt, sampling: Sampling, *, raw: bool = False, system: str | None = None,
        tools: Tools | None = None, is_patient: bool = False,
    ) -> Stream:  # fmt: skip
        """Start an answer and return its chunks as they are made; who `is_patient` waits for room in the queue."""
        request = Request(
            self.encode(prompt, raw=raw, system=system, tools=tools),
            sampling,
            self._grammar(sampling, tools),
            tools.reader() if tools is not None else None,
        )
        self._batcher.submit(request, is_patient=is_patient)
        return Stream(request, self)

    def _grammar(self, sampling: Sampling, tools: Tools | None) -> Grammar | None:
        return self._grammars.of(sampling) if tools is None else tools.grammar(self._grammars)

    def generate(
        self, prompt: Prompt, sampling: Sampling, *, raw: bool = False, system: str | None = None,
        tools: Tools | None = None,
    ) -> GenerationResult:  # fmt: skip
        """Return the whole answer."""
        return _fold(self.stream(prompt, sampling, raw=raw, system=system, tools=tools))

    def generate_batch(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, raw: bool = False, system: str | None = None,
        tools: Tools | None = None,
    ) -> list[GenerationResult]:  # fmt: skip
        """Return all answers, in the order of the prompts; one that failed has its `error` and no text."""
        streams: list[Stream | Exception] = []
        self._grammar(sampling, tools)  # one that cannot be meant is refused for all
        try:
            for prompt in prompts:
                try:
                    streams.append(self.stream(prompt, sampling, raw=raw, system=system, tools=tools, is_patient=True))
                except Exception as error:  # noqa: BLE001 - it becomes that prompt's result
                    streams.append(error)
            return [_result_of(stream) for stream in streams]
        finally:
            for stream in streams:
                if isinstance(stream, Stream):
                    stream.close()

    def wait_until_idle(self) -> None:
        """Return when no answer is being made."""
        self._batcher.wait_until_idle()

    @property
    def idle_since(self) -> float | None:
        """When the last request ended, or this was made, as time.monotonic() had it; None while answers are made."""
        return self._batcher.idle_since

    def note_use(self) -> None:
        """Take note that the weights are in use outside of requests: it is not idle before now."""
        self._batcher.note_use()

    @property
    def cache(self) -> KVCache | None:
        """The KV cache, or None once this is closed; look, and let go of it."""
        return getattr(self._batcher, "cache", None)

    def drain(self) -> None:
        """Take no more requests, and return when those under way are answered."""
        self._batcher.drain()

    def renew_cache(self) -> bool:
        """Give back the memory of the KV cache and all that it remembers; return False while an answer is made."""
        return self._batcher.renew_cache()

    def save_prefixes(self, file: str | os.PathLike[str]) -> int:
        """Write what the KV cache remembers to `file`; see `ModelManager.save_prefix_cache`."""
        return self._batcher.save_prefixes(Path(file))

    def load_prefixes(self, file: str | os.PathLike[str]) -> int:
        """Remember what `file` says; see `ModelManager.load_prefix_cache`."""
        return self._batcher.load_prefixes(Path(file))

    def close(self) -> None:
        """End every request and let go of the decoder."""
        self._batcher.close()


def _conversation(prompt: Prompt, system: str | None) -> list[Mapping[str, Any]]:
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(said, Sequence) or not said or not all(isinstance(one, Mapping) for one in said):
        raise ConfigurationError(
            "A prompt is a text, or a list of one or more messages.",
            hint='For example [{"role": "user", "content": "你好"}].',
        )
    messages = [with_calls(message) for message in said]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _fold(stream: Stream) -> GenerationResult:
    for _ in stream:
        pass
    return stream.result


def _result_of(stream: Stream | Exception) -> GenerationResult:
    try:
        if isinstance(stream, Exception):
            raise stream
        return _fold(stream)
    except Exception as error:  # noqa: BLE001 - it becomes that prompt's result
        return GenerationResult("", "error", Usage(0, 0), Timing(0.0, 0.0, 0.0, 0.0), error)
