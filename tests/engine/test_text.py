"""Tokens turned into text as they come."""

from __future__ import annotations

from functools import lru_cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.engine.text import TextStream

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PARTS = [" ", "  ", "hello", " hello", "你好", "世", "🎉", "👩‍👩‍👧‍👦", "é", "\n", _BROKEN]
_TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(_PARTS)).map("".join),
)


def _finish(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<工具>", special=False, normalized=False)])
    return Tokenizer(backend)


@lru_cache
def _byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["hello world 你好 你好 世界 世间 🎉🎉"] * 3, trainer)
    return _finish(backend)


@lru_cache
def _sentence_piece(strips: bool) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helo你", "▁h", "el", "▁▁", "▁▁▁"]
    merges = [("▁", "h"), ("e", "l"), ("▁", "▁"), ("▁▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    before = [normalizers.Prepend("▁")] if strips else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if strips else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    backend.decoder = decoders.Sequence(steps)
    return _finish(backend)


@lru_cache
def _metaspace() -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", *"▁helo你好", "▁h"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "h")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _finish(backend)


_KINDS = {
    "byte-level": _byte_level,
    "sentence-piece": lambda: _sentence_piece(True),
    "sentence-piece without prefix": lambda: _sentence_piece(False),
    "metaspace": _metaspace,
}
_each_kind = pytest.mark.parametrize("kind", _KINDS)


def _stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    stream = TextStream(tokenizer)
    return [stream.push(one) for one in ids], stream.flush()


@_each_kind
@given(text=_TEXTS)
def test_stream_of_a_text_is_its_decoding(kind: str, text: str) -> None:
    """The pieces of any text's tokens join to what the tokenizer decodes at once."""
    tokenizer = _KINDS[kind]()
    ids = tokenizer.encode(text, add_special_tokens=True)
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@given(data=st.data())
def test_stream_of_any_tokens_is_their_decoding(kind: str, data: st.DataObject) -> None:
    """Tokens that no text has, such as half characters and unknown ids, join to their decoding too."""
    tokenizer = _KINDS[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@pytest.mark.parametrize("strips", [True, False])
@given(data=st.data())
def test_sentence_piece_bytes_lose_no_whole_character(strips: bool, data: st.DataObject) -> None:
    """Of arbitrary byte tokens, what is UTF-8 comes out; where all is, it is the decoding."""
    tokenizer = _sentence_piece(strips)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    pieces, rest = _stream(tokenizer, ids)
    whole = tokenizer.decode(ids)
    if _BROKEN in whole:
        assert _BROKEN in "".join(pieces) + rest
    else:
        assert "".join(pieces) + rest == whole


@_each_kind
@given(data=st.data())
def test_no_replacement_character_that_the_text_has_not(kind: str, data: st.DataObject) -> None:
    """A character that is not complete yet is waited for, not replaced."""
    tokenizer = _KINDS[kind]()
    text = data.draw(_TEXTS.filter(lambda text: _BROKEN not in text))
    pieces, _rest = _stream(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert not any(_BROKEN in piece for piece in pieces)


def test_character_of_several_tokens_comes_whole() -> None:
    """An emoji spelled in four byte tokens appears with the last of them."""
    tokenizer = _sentence_piece(True)
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert _stream(tokenizer, ids) == (["", "", "", "🙂"], "")


def test_incomplete_character_is_replaced_at_the_end_only() -> None:
    """What is left of a broken character is one U+FFFD, from flush."""
    tokenizer = _byte_level()
    ids = [tokenizer.backend.token_to_id(letter) for letter in "ðŁ"]  # the first half of an emoji
    assert _stream(tokenizer, ids) == (["", ""], _BROKEN)


def test_leading_space_is_dropped_once_only() -> None:
    """SentencePiece's own first blank goes; the blanks between words stay."""
    tokenizer = _sentence_piece(True)
    ids = [tokenizer.backend.token_to_id(piece) for piece in ("▁h", "el", "▁h")]
    assert _stream(tokenizer, ids) == (["h", "el", " h"], "")


def test_special_tokens_are_passed_over_and_added_ones_shown() -> None:
    """The end token is not text; a user-defined token is, whatever its alphabet."""
    tokenizer = _byte_level()
    ids = tokenizer.encode("<工具>hello<end>", add_special_tokens=False)
    pieces, rest = _stream(tokenizer, ids)
    assert "".join(pieces) + rest == "<工具>hello"


def test_stream_is_ready_again_after_flush() -> None:
    """A second answer starts afresh: no bytes of the first, and its own leading blank dropped."""
    tokenizer = _sentence_piece(True)
    stream = TextStream(tokenizer)
    first = tokenizer.backend.token_to_id("<0xF0>")
    assert (stream.push(first), stream.flush()) == ("", _BROKEN)
    assert stream.push(tokenizer.backend.token_to_id("▁h")) == "h"


def test_a_long_run_of_broken_bytes_does_not_pile_up() -> None:
    """Bytes that can never become a character are shown as they come, not kept to the end."""
    tokenizer = _byte_level()
    broken = tokenizer.backend.token_to_id("ÿ")  # the byte FF
    pieces, rest = _stream(tokenizer, [broken] * 50)
    assert pieces == [_BROKEN] * 50
    assert rest == ""
