"""One request and what comes of it: chunks while it runs, a result when it is done.

The side that computes puts chunks, or the error that ended the work; the side that asked takes them. Knows no
tokens' meaning and no model.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from loadstone.config import Sampling
from loadstone.errors import GenerationError

from ._llguidance import Grammar
from .logprobs import TokenLogprob
from .tool_formats import Reader, ToolCall


@dataclass(frozen=True)
class Usage:
    """How many tokens a request took.

    `cached_tokens` of the prompt were in the KV cache already, from an earlier one that begins alike. Of
    `drafted_tokens`, guessed to be computed ahead, `accepted_tokens` were right and are part of the answer.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds since it was asked; `tokens_per_s` is of decoding, after the first."""

    queued_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class GenerationResult:
    """An answer. `str(result)` is its text.

    `finish_reason` is "stop" (the model ended, or a stop string came), "length" (max_new_tokens or the context's
    end), "cancelled", or "error" with the `error`, which only results of a batch have. `tokens` are those that the
    model chose, its end included; `logprobs` has an item for each where they were asked for.

    `parsed` is the value of an answer that follows a JSON schema: what json.loads makes of the text. It is None where
    none was asked for, and where the answer is not whole, as with finish_reason "length".

    `tool_calls` are the functions that the model calls, which are not part of the text; `tool_errors` say of what looks
    like a call why it is none, and was left in the text. `message` is the answer as the next message of a conversation.
    """

    text: str
    finish_reason: str
    usage: Usage
    timing: Timing
    error: Exception | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    parsed: Any = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_errors: tuple[str, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the assistant, its calls included."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.message() for call in self.tool_calls]
        return message

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one has the `result`. `str(chunk)` is its text."""

    text: str
    result: GenerationResult | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended, on the last chunk."""
        return self.result.finish_reason if self.result else None

    def __str__(self) -> str:
        return self.text


_numbers = itertools.count(1)


@dataclass(eq=False)
class Request:
    """What is asked: tokens of the prompt, the rules for the answer, the `grammar` that it follows and the `reader` of
    its calls; and the line on which chunks go back.

    `id` names it in events: requests of a process are numbered from 1. Who cancels it puts it among the
    `cancellations`, so that who serves it need not look at every request.
    """

    prompt: Sequence[int]
    sampling: Sampling
    grammar: Grammar | None = None
    reader: Reader | None = None
    asked_at: float = field(default_factory=time.perf_counter)
    line: queue.SimpleQueue[Chunk | BaseException] = field(default_factory=queue.SimpleQueue)
    cancellations: deque[Request] = field(default_factory=deque)
    is_cancelled: bool = False
    id: int = field(default_factory=_numbers.__next__)

    def cancel(self) -> None:
        """Ask for no more. Takes no lock: a stream that nobody holds calls it wherever Python collects garbage."""
        self.is_cancelled = True
        self.cancellations.append(self)


class Stream(Iterator[Chunk]):
    """The chunks of one answer as they are made.

    Leaving the loop, `close()`, `cancel()` or the end of a `with` block stops the work within one token. An
    exception in the work is raised from the loop.
    """

    def __init__(self, request: Request, source: object = None) -> None:
        """Take what comes on the request's line; `source` is held, so that who answers lives as long as this."""
        self._request = request
        self._source = source
        self._result: GenerationResult | None = None
        self._is_over = False

    @property
    def id(self) -> int:
        """The number that names this request in events (`generate.read`)."""
        return self._request.id

    @property
    def result(self) -> GenerationResult:
        """The whole answer, when the last chunk has been taken; raises GenerationError before."""
        if self._result is None:
            raise GenerationError("The answer is not finished: read the stream to its end first.")
        return self._result

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while (chunk := next(self, None)) is not None:
                yield chunk
        finally:
            self.cancel()  # the loop was left, perhaps by one who still holds this stream

    def __next__(self) -> Chunk:
        if self._is_over:
            raise StopIteration
        try:
            item = self._request.line.get()
        except BaseException:
            self.cancel()  # Ctrl-C while waiting: nobody will read the rest
            raise
        if isinstance(item, BaseException):
            self._is_over = True
            raise item
        if item.result is not None:
            self._is_over = True
            self._result = item.result
        return item

    def cancel(self) -> None:
        """Stop the work within one token; the stream then ends with finish_reason "cancelled"."""
        if not self._is_over:
            self._request.cancel()

    def close(self) -> None:
        """Cancel what is left and take no more chunks."""
        self.cancel()
        self._is_over = True

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.cancel()  # a stream that nobody holds is one that nobody reads
