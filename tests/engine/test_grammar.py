"""Grammars: what they let through, token by token, of what was written beforehand."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import small_model
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import Sampling
from loadstone.engine._llguidance import Grammar, Grammars

BACKEND = small_model._tokenizer()
SIZE = BACKEND.get_vocab_size()
GRAMMARS = Grammars(Tokenizer(BACKEND), SIZE, [])
CHANGING = small_model._tokenizer()
CHANGING.normalizer = tokenizers.normalizers.NFKC()
CHANGING_GRAMMARS = Grammars(Tokenizer(CHANGING), SIZE, [])

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
IN_JSON = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=8)  # which llguidance escapes
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | IN_JSON,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(IN_JSON, inner, max_size=3),
    max_leaves=8,
)


def _allowed(grammar: Grammar) -> set[int]:
    return set(grammar.allow(torch.zeros(SIZE)).isfinite().nonzero().flatten().tolist())


def _follow(grammar: Grammar, text: str) -> None:
    """Go through a text token by token, each of which must be allowed, and all that was sure must be what comes."""
    ids = BACKEND.encode(text).ids
    sure: list[int] = []
    for place, token in enumerate(ids):
        sure = sure or grammar.sure()
        if sure:
            assert sure.pop(0) == token
        assert not grammar.is_over
        assert token in _allowed(grammar), (text, place)
        grammar.take(token)


def _schema_of(value: Any) -> dict[str, Any]:
    """Return a schema of values of the same form."""
    if isinstance(value, dict):
        named = {key: _schema_of(one) for key, one in value.items()}
        return {"type": "object", "properties": named, "required": [*value], "additionalProperties": False}
    if isinstance(value, list):
        items = [_schema_of(one) for one in value]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    kinds = {bool: "boolean", int: "integer", str: "string", type(None): "null"}
    return {"type": kinds[type(value)]}


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_what_has_the_form_of_a_schema_follows_it(value: Any) -> None:
    """Written as json.dumps does it, whatever its texts and names are."""
    grammar = GRAMMARS.of_schema(json.dumps(_schema_of(value)), "json_schema")
    _follow(grammar, json.dumps(value, ensure_ascii=False))
    if type(value) is not int:  # which may have another digit
        assert grammar.is_over


@given(st.lists(TEXTS.filter(bool), min_size=1, max_size=5, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_each_choice_can_be_said(choices: list[str], data: st.DataObject) -> None:
    grammar = GRAMMARS.of(Sampling(choices=tuple(choices)))
    assert grammar is not None
    said = data.draw(st.sampled_from(choices))
    _follow(grammar, said)
    assert grammar.is_over == (not any(other != said and other.startswith(said) for other in choices))


@given(TEXTS.filter(bool))
@settings(max_examples=40, deadline=None)
def test_what_must_come_has_its_own_bytes_though_the_tokenizer_would_change_them(text: str) -> None:
    """Unicode's normal forms are for what is read."""
    grammar = CHANGING_GRAMMARS.of(Sampling(choices=(text,)))
    assert grammar is not None
    _follow(grammar, text)
    assert grammar.is_over


def test_a_special_token_is_not_allowed_where_its_text_is() -> None:
    """A text that reads like the end of an answer is a text."""
    backend = small_model._tokenizer()
    backend.add_special_tokens(["<|end|>"])
    end = backend.token_to_id("<|end|>")
    grammar = Grammars(Tokenizer(backend), SIZE + 1, [end]).of(Sampling(choices=("a<|end|>b", "a")))
    assert grammar is not None
    for character in "a<|end|>b":
        allowed = set(grammar.allow(torch.zeros(SIZE + 1)).isfinite().nonzero().flatten().tolist())
        assert BACKEND.token_to_id(character) in allowed
        assert (end in allowed) == (character == "<")  # where the other choice may end
        grammar.take(backend.token_to_id(character))
    assert grammar.is_over


def test_tokens_that_fit_are_counted() -> None:
    grammar = GRAMMARS.of(Sampling(choices=("abcd",)))
    assert grammar is not None
    assert grammar.fitting(BACKEND.encode("abxd").ids) == 2
    assert grammar.fitting(BACKEND.encode("abcd").ids) == 4
    _follow(grammar, "abcd")  # they were not taken


def test_two_answers_follow_one_grammar_each_on_its_own() -> None:
    first, second = (GRAMMARS.of(Sampling(regex="[ab]{3}")) for _ in range(2))
    assert first is not None
    assert second is not None
    _follow(first, "aba")
    assert first.is_over
    assert not second.is_over


def test_the_logits_given_stay_as_they_are() -> None:
    grammar = GRAMMARS.of(Sampling(choices=("a",)))
    assert grammar is not None
    logits = torch.zeros(SIZE)
    assert grammar.allow(logits).isinf().sum() == SIZE - 1
    assert not logits.any()


def test_grammars_go_with_who_made_them() -> None:
    """Python's garbage collector does not see into llguidance, which calls back."""
    grammars = Grammars(Tokenizer(BACKEND), SIZE, [])
    grammars.of(Sampling(choices=("a",)))
    gone = weakref.ref(grammars)
    taken = weakref.ref(grammars._tokenizer)
    del grammars
    gc.collect()
    assert gone() is None
    assert taken() is None


@pytest.mark.parametrize("pattern", ["^abc$", "abc"])
def test_an_expression_is_of_the_whole_answer(pattern: str) -> None:
    grammar = GRAMMARS.of(Sampling(regex=pattern))
    assert grammar is not None
    _follow(grammar, "abc")
    assert grammar.is_over
