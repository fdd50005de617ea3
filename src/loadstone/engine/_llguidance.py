"""Which tokens an answer may have next, so that the whole of it follows a grammar: llguidance, and its limits.

A grammar is made of a JSON schema, a regular expression, a list of texts, or llguidance's own notation. Knows the bytes
of tokens and nothing of logits' origin or of who asks.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import Sampling
from loadstone.config.json_schema import pointer
from loadstone.errors import ConfigurationError, GenerationError

from .schema_place import place_of
from .text import token_bytes

if TYPE_CHECKING:  # comes in with the first grammar
    import llguidance

# As json.dumps writes it, and the templates of models that call tools. One layout, since a small model that may write
# blanks often does nothing else, and since what can be written in one way alone need not be computed token by token.
LAYOUT: llguidance._lib.JsonCompileOptions = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ",
}  # fmt: skip
# Sets of tokens that are looked at once, when a tokenizer is taken: inside strings nearly all are allowed. Two of
# llguidance's own four, which take half of the memory; without any a mask takes 1.5 ms, and not 0.1.
SLICES = [r'[^"\\\x00-\x1F\x7F]{1,10}', r'[^"\\\x00-\x1F\x7F]+']
MOST_KEPT = 32  # grammars


class Grammars:
    """Makes grammars for one model, whose logits have `vocabulary` columns and whose answers end with one of `ends`.

    The newest are kept. The tokenizer is taken with the first: half a second and 40 MB for 150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        # A model without an end gets one that it cannot say, so that no token of a text is taken for it.
        self._ends = [end for end in ends if end < vocabulary] or [vocabulary]
        self._taken: llguidance.LLTokenizer | None = None
        self._made: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, sampling: Sampling) -> Grammar | None:
        """Return the grammar that an answer follows, or None where it may say anything.

        Raises ConfigurationError, with the place, for what no answer can follow or what is not supported.
        """
        if sampling.json_schema is not None:
            return self.of_schema(sampling.json_schema, "json_schema")
        if sampling.regex is not None:
            return self._grammar(_of_regex(sampling.regex), lambda reason: _bad_regex(sampling.regex or "", reason))
        if sampling.choices:
            literals = " | ".join(literal(one) for one in sampling.choices)
            return self.of_lark(f"start: CHOICE\nCHOICE: {literals}", "choices")
        return None

    def of_schema(self, schema: str, name: str) -> Grammar:
        """Return the grammar of a JSON schema, which errors call `name`."""
        return self._grammar(_of_schema(schema), lambda reason: self._bad_schema(schema, name, reason))

    def of_lark(self, lark: str, name: str) -> Grammar:
        """Return the grammar that is written in llguidance's notation, which errors call `name`."""
        return self._grammar(_of_lark(lark), lambda reason: _refusal(name, _in_a_line(reason)))

    def _grammar(self, text: str, refusal: Callable[[str], ConfigurationError]) -> Grammar:
        with self._lock:
            taken = self._taken = self._taken or self._take_tokenizer()
            made = self._made.get(text)
            if made is not None:
                self._made.move_to_end(text)
        if made is None:
            made = _matcher(taken, text)
            if (reason := _why_not(made)) is not None:
                raise refusal(reason)
            with self._lock:
                self._made[text] = made
                while len(self._made) > MOST_KEPT:
                    self._made.popitem(last=False)
        return Grammar(made.deep_copy(), taken.vocab_size)

    def _bad_schema(self, schema: str, name: str, reason: str) -> ConfigurationError:
        """Return the error for a schema that is refused for this reason."""

        def says(part: str) -> str | None:
            assert self._taken is not None  # it has refused the whole
            return _why_not(_matcher(self._taken, _of_schema(part)))

        return _refusal(f"{name}{_at(pointer(place_of(reason, json.loads(schema), says)))}", _in_a_line(reason))

    def _take_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        spelled = token_bytes(self._tokenizer, self._vocabulary)
        if spelled is None:
            raise GenerationError(
                "This model's answers cannot follow a grammar: how its tokenizer spells tokens is not known.",
                hint="Ask without, or take a model whose tokenizer is byte-level or SentencePiece's with bytes.",
            )
        virtual = [b""] * (max(self._ends) + 1 - self._vocabulary)
        wrapped = llguidance.TokenizerWrapper(_Spelling(self))
        wrapped.tokens = [*spelled, *virtual]
        taken = llguidance.LLTokenizer(wrapped, eos_token=self._ends, slices=SLICES)
        wrapped.tokens = []  # it has them in a form of its own by now
        return taken


class _Spelling:
    """What llguidance asks of a tokenizer: the bytes of each token, and the tokens of a text that is sure to come."""

    bos_token_id = None

    def __init__(self, grammars: Grammars) -> None:
        self.tokens: Sequence[bytes] = ()
        self.special_token_ids = grammars._ends
        self.eos_token_id = grammars._ends[0]
        self._grammars = weakref.ref(grammars)  # which hold this one, where Python's garbage collector does not look
        self._backend = grammars._tokenizer.backend

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens that the model reads for a text, which have exactly its bytes.

        Where its tokenizer changes texts (Unicode's normal forms, a blank before the first word), or reads a special
        token in one, tokens are the longest that fit, one after the other.
        """
        grammars = self._grammars()
        taken = None if grammars is None else grammars._taken
        ids: list[int] = self._backend.encode(text.decode("utf-8"), add_special_tokens=False).ids
        if taken is None or taken.decode_bytes(ids) == text:
            return ids
        return taken.greedy_tokenize(text.decode("utf-8"))


class Grammar:
    """What one answer follows, and how far it has come."""

    def __init__(self, matcher: llguidance.LLMatcher, tokens: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((tokens + 31) // 32, dtype=np.int32)

    @property
    def is_over(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._matcher.is_stopped()

    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (vocabulary) with -inf for each token that cannot come next; those given stay as they are.

        Raises GenerationError where the grammar turns out to be too complex.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=len(logits), bitorder="little")
        return logits.where(torch.from_numpy(bits.view(np.bool_)).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on after a token that was allowed."""
        self._matcher.consume_token(token)
        self._check()

    def sure(self) -> list[int]:
        """Return the tokens that must come next, as far as there is one way to go on."""
        return self._matcher.compute_ff_tokens()

    def fitting(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, could come next."""
        return self._matcher.validate_tokens(list(tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GenerationError(
                f"The answer cannot follow its grammar any further: {_in_a_line(self._matcher.get_error())}.",
                hint="Use a simpler schema or expression: repetitions of repetitions grow the fastest.",
            )


def literal(text: str) -> str:
    """Return a text as llguidance's notation writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _of_schema(schema: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)


def _of_regex(regex: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_regex(regex)


def _of_lark(lark: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_lark(lark)


def _matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _why_not(matcher: llguidance.LLMatcher) -> str | None:
    """Return why no answer can follow a grammar, or None."""
    if not matcher.is_error():
        first = matcher.deep_copy()
        first.compute_bitmask()
        if not first.is_error():
            return None
        return "no answer can follow it"
    # What comes after is the way by which it came there, and differs from part to part.
    return matcher.get_error().removesuffix("<non-verbose/>").partition("\n  while processing ")[0].strip()


def _refusal(what: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{what}: {reason}", key=what.partition(" ")[0])


def _bad_regex(regex: str, reason: str) -> ConfigurationError:
    """Return the error for a regular expression, with the character where it goes wrong, as far as that is told."""
    lines = reason.splitlines()
    carets = [line for line in lines if line.startswith("    ") and not line.strip(" ^")]
    shown = [line for line in lines if line == f"    {regex}"]
    place = f" at character {carets[0].index('^') - 3}" if carets and shown and "^" in carets[0] else ""
    return _refusal(f"regex{place}", _in_a_line(reason))


def _at(place: str) -> str:
    return f" at {place}" if place else ""


def _in_a_line(reason: str) -> str:
    """Return llguidance's reason in one line: of several, the one that says what is wrong."""
    lines = reason.removesuffix("<non-verbose/>").strip().splitlines() or ["it is refused"]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    said = said.rpartition(" (in regex): ")[2]
    if (words := re.fullmatch(r"Unimplemented keys: \[(.*)\]", said)) is not None:
        return f"not supported: {words[1]}"
    return said.partition(". Enable ")[0][:300]  # an option of llguidance's own
