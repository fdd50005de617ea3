"""The peer llama.cpp with many streams, opened for `benchmarks.batch` through its own C functions.

llama-cpp-python's class answers one at a time; llama.cpp itself takes a batch of tokens of many sequences, as here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .answers import Answer

BATCH_TOKENS = 512  # of one pass, as llama.cpp has by default

Token = tuple[int, int, int, bool]  # its number, its place in its stream, the stream, and whether its logits are wanted


def open_model(settings: Mapping[str, Any]) -> LlamaCppStreams:
    """Load the GGUF file `model` for so many `streams` of `context` tokens, with as many `threads`."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    wish = llama_cpp.llama_model_default_params()
    wish.n_gpu_layers = 0 if settings["device"] == "cpu" else -1
    model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), wish)
    room = llama_cpp.llama_context_default_params()
    room.n_seq_max = settings["streams"]
    room.n_ctx = settings["streams"] * settings["context"]
    room.n_batch = BATCH_TOKENS
    room.n_threads = room.n_threads_batch = settings["threads"]
    context = llama_cpp.llama_init_from_model(model, room) if model else None
    if not context:
        raise OSError(f"llama.cpp cannot open {settings['model']}")
    return LlamaCppStreams(model, context, settings["streams"])


class LlamaCppStreams:
    """A context with a sequence for each stream. All prompts are read, many tokens a pass, and then all answer."""

    def __init__(self, model: Any, context: Any, streams: int) -> None:
        import llama_cpp

        self._context = context
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama_cpp.llama_batch_init(max(BATCH_TOKENS, streams), 0, 1)

    def ask(self, text: str, tokens: int) -> Answer:
        """Return the answer to one text."""
        return self.ask_together([text], tokens)[0]

    def ask_together(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Return the answers to texts, of which each is a stream."""
        import llama_cpp

        prompts = [self._tokenize(text) for text in texts]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        asked = time.perf_counter()
        made: list[list[int]] = [[] for _ in prompts]
        first_s = [0.0] * len(prompts)
        for part in _parts(list(_prompt_tokens(prompts))):
            for stream, token in self._pass(part):
                made[stream].append(token)
                first_s[stream] = time.perf_counter() - asked
        for _ in range(tokens - 1):
            latest = [(one[-1], len(prompts[n]) + len(one) - 1, n, True) for n, one in enumerate(made)]
            for part in _parts(latest):
                for stream, token in self._pass(part):
                    made[stream].append(token)
        last_s = time.perf_counter() - asked
        return [
            Answer(len(prompt), len(one), first, last_s)
            for prompt, one, first in zip(prompts, made, first_s, strict=True)
        ]

    def read_per_token(self) -> None:
        """Return None: the file says it."""

    def _tokenize(self, text: str) -> list[int]:
        import llama_cpp

        content = text.encode()
        room = (llama_cpp.llama_token * len(content))()
        count = llama_cpp.llama_tokenize(self._vocabulary, content, len(content), room, len(content), False, False)
        return list(room[:count])

    def _pass(self, tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
        """Compute tokens; yield the stream and the likeliest next token of those whose logits are wanted."""
        import llama_cpp
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, place, stream, is_wanted) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.logits[index] = token, place, is_wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, stream
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise OSError(f"llama_decode failed: {code}")
        for index, (_, _, stream, is_wanted) in enumerate(tokens):
            if is_wanted:
                logits = llama_cpp.llama_get_logits_ith(self._context, index)
                yield stream, int(np.ctypeslib.as_array(logits, (self._vocabulary_size,)).argmax())


def _prompt_tokens(prompts: Sequence[Sequence[int]]) -> Iterator[Token]:
    for stream, prompt in enumerate(prompts):
        for place, token in enumerate(prompt):
            yield token, place, stream, place == len(prompt) - 1


def _parts(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    return (tokens[start : start + BATCH_TOKENS] for start in range(0, len(tokens), BATCH_TOKENS))
