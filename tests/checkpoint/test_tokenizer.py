"""Tokenizers of tokenizer.json files and of GGUF metadata."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_models import (
    CONTROL,
    CORPUS,
    bundled_model,
    gguf_keys,
    make_spec,
    sentence_piece_keys,
    train_byte_level,
    write_gguf,
)
from tokenizers import processors

from loadstone.checkpoint import load_tokenizer
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.errors import CheckpointError, ConfigurationError

_VARIED = [
    *CORPUS,
    "",
    " ",
    "  two  spaces\n\n\tand\r\n lines 2024-01-31 ",
    "<|im_start|>user\n你好<|im_end|>\n<tool_call>{}",
    "cafe\u0301 e\u0301",
    "[PAD703] 🏳️‍🌈",
]

_trained = lru_cache(train_byte_level)


def _folder(place: Path, settings: dict[str, Any] | None = None) -> Path:
    _trained().save(str(place / "tokenizer.json"))
    if settings is not None:
        (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return place


def _load_gguf(place: Path, keys: dict[str, Any], **spec: Any) -> Tokenizer:
    return load_tokenizer(make_spec(write_gguf(place / "model.gguf", keys), **spec))


# tokenizer.json


def test_tokenizer_json_gives_its_own_ids(tmp_path: Path) -> None:
    """The folder's tokenizer.json is used as it is, and text survives the way there and back."""
    tokenizer = load_tokenizer(make_spec(_folder(tmp_path)))
    for text in _VARIED:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == _trained().encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == _trained().decode(ids, False)
    assert tokenizer.vocab_size == _trained().get_vocab_size()


@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_special_tokens_are_texts_or_mappings(tmp_path: Path, token: object) -> None:
    """tokenizer_config.json writes special tokens in two ways; both are read."""
    folder = _folder(tmp_path, {"eos_token": token, "bos_token": None})
    tokenizer = load_tokenizer(make_spec(folder, eos_token_ids=(7,)))
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_ids == (7, _trained().token_to_id("<|im_end|>"))


def test_beginning_token_is_added_when_the_settings_say_so(tmp_path: Path) -> None:
    """add_bos_token holds where tokenizer.json adds nothing itself, when special tokens are wanted."""
    folder = _folder(tmp_path, {"bos_token": "<|endoftext|>", "add_bos_token": True})
    tokenizer = load_tokenizer(make_spec(folder))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    begin = tokenizer.backend.token_to_id("<|endoftext|>")
    assert tokenizer.encode("hello", add_special_tokens=True) == [begin, *plain]
    assert begin not in plain


def test_beginning_token_is_not_added_twice(tmp_path: Path) -> None:
    """A tokenizer.json that adds the token itself is left alone."""
    backend = train_byte_level()
    begin = backend.token_to_id("<|endoftext|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    ids = load_tokenizer(make_spec(tmp_path)).encode("hello", add_special_tokens=True)
    assert ids.count(begin) == 1


def test_training_settings_do_not_cut_or_pad_text(tmp_path: Path) -> None:
    """Truncation and padding stored in tokenizer.json are switched off."""
    backend = train_byte_level()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(make_spec(tmp_path)).encode(CORPUS[0], add_special_tokens=True)
    assert ids == _trained().encode(CORPUS[0]).ids


def test_tokens_that_only_the_settings_know_are_added(tmp_path: Path) -> None:
    """added_tokens_decoder may hold tokens that tokenizer.json lacks; their ids are kept."""
    new = _trained().get_vocab_size()
    added = {str(new): {"content": "<|new|>", "special": True}, "5000": {"content": "<|gap|>"}}
    tokenizer = load_tokenizer(make_spec(_folder(tmp_path, {"added_tokens_decoder": added})))
    assert tokenizer.encode("<|new|>", add_special_tokens=False) == [new]
    assert tokenizer.backend.token_to_id("<|gap|>") is None


def test_lone_surrogates_do_not_break_encoding(tmp_path: Path) -> None:
    """Half a character of UTF-16 becomes U+FFFD, and whole pairs become their character."""
    tokenizer = load_tokenizer(make_spec(_folder(tmp_path)))
    ids = tokenizer.encode("a\ud83d b\ud83c\udf89", add_special_tokens=False)
    assert tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER} b🎉"


def test_missing_tokenizer_names_folder_and_remedy(tmp_path: Path) -> None:
    """A folder without tokenizer.json is said by name, with what to do."""
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*tokenizer\.model") as caught:
        load_tokenizer(make_spec(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "save_pretrained" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', '{"version": "1.0", "model": {"type": "X"}}'])
def test_broken_tokenizer_json_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    """Whatever is wrong inside, the error names the file."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(make_spec(tmp_path))


def test_broken_settings_are_a_checkpoint_error(tmp_path: Path) -> None:
    """tokenizer_config.json that is not JSON is named, not ignored."""
    folder = _folder(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(make_spec(folder))


def test_unknown_ids_are_passed_over_by_decode_and_refused_by_token(tmp_path: Path) -> None:
    """A padded vocabulary has ids that no token has."""
    tokenizer = load_tokenizer(make_spec(_folder(tmp_path)))
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.token(tokenizer.backend.token_to_id("<|im_end|>")) == "<|im_end|>"
    for unknown in (10**6, -1):
        with pytest.raises(ConfigurationError):
            tokenizer.token(unknown)


def test_importing_the_room_imports_no_library() -> None:
    """tokenizers and jinja2 are imported when a tokenizer or template is used, not before."""
    code = (
        "import sys, loadstone.checkpoint.tokenizer, loadstone.checkpoint.template;"
        "sys.exit(any(name in sys.modules for name in ('tokenizers', 'jinja2', 'gguf', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# GGUF, byte-level


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "gpt-2"])
def test_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from(tmp_path: Path, pre: str) -> None:
    """Vocabulary, merges, splitting and special tokens come through GGUF unchanged."""
    backend = train_byte_level(pre)
    tokenizer = _load_gguf(tmp_path, gguf_keys(backend, pre))
    assert tokenizer.eos_token == "<|im_end|>"
    for text in _VARIED:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids)


@pytest.fixture(scope="module")
def qwen_gguf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _load_gguf(tmp_path_factory.mktemp("qwen"), gguf_keys(_trained(), "qwen2"))


@given(st.text(max_size=40))
def test_gguf_and_json_agree_on_any_text(qwen_gguf: Tokenizer, text: str) -> None:
    """The same, for text nobody thought of."""
    assert qwen_gguf.encode(text, add_special_tokens=True) == _trained().encode(text).ids


def test_padding_tokens_are_neither_read_nor_shown(qwen_gguf: Tokenizer) -> None:
    """Rows that only fill the matrix up ("[PAD703]") are no tokens."""
    assert qwen_gguf.decode([_trained().get_vocab_size()]) == ""


def test_qwen_files_without_splitting_are_split_as_qwen(tmp_path: Path) -> None:
    """Files older than tokenizer.ggml.pre say nothing; their architecture tells."""
    keys = gguf_keys(_trained(), "qwen2")
    del keys["ggml.pre"]
    tokenizer = _load_gguf(tmp_path, keys)
    assert tokenizer.encode(CORPUS[0], add_special_tokens=False) == _trained().encode(CORPUS[0]).ids


def test_llama_bpe_splits_numbers_by_three_and_begins_with_bos(tmp_path: Path) -> None:
    """Llama 3's way: up to three digits a word, whole words from the vocabulary first, a beginning token."""
    tokenizer = _load_gguf(tmp_path, gguf_keys(_trained(), "llama-bpe"), gguf_name="llama")
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str("in 12345")
    assert [word for word, _place in words] == ["in", "Ġ", "123", "45"]
    ids = tokenizer.encode("a", add_special_tokens=True)
    assert ids[0] == tokenizer.backend.token_to_id("<|endoftext|>")
    assert tokenizer.bos_token == "<|endoftext|>"


def test_flags_for_beginning_and_end_are_followed(tmp_path: Path) -> None:
    """add_bos_token and add_eos_token put the tokens around every text."""
    keys = gguf_keys(_trained(), "qwen2") | {"ggml.add_bos_token": True, "ggml.add_eos_token": True}
    tokenizer = _load_gguf(tmp_path, keys)
    plain = tokenizer.encode("hello", add_special_tokens=False)
    begin, end = keys["ggml.bos_token_id"], keys["ggml.eos_token_id"]
    assert tokenizer.encode("hello", add_special_tokens=True) == [begin, *plain, end]


def test_control_tokens_that_end_an_answer_are_all_known(tmp_path: Path) -> None:
    """GGUF names one end; the model may use another of its control tokens, and the spec its own."""
    keys = gguf_keys(_trained(), "qwen2")
    tokenizer = _load_gguf(tmp_path, keys, eos_token_ids=(5,))
    assert set(tokenizer.eos_token_ids) == {5, keys["ggml.eos_token_id"], keys["ggml.bos_token_id"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ggml.model": "bert"}, "bert"),
        ({"ggml.model": None}, "no tokenizer"),
        ({"ggml.pre": "future-bpe"}, "future-bpe.*qwen2"),
        ({"ggml.tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"ggml.token_type": [1, 1]}, r"token_type"),
        ({"ggml.eos_token_id": 99999}, "99999"),
        ({"ggml.merges": None}, "merges"),
        ({"ggml.merges": ["nospace"]}, "tokenizer"),
        ({"ggml.merges": ["zzzz yyyy"]}, "tokenizer"),
    ],
)
def test_contradictory_metadata_is_a_checkpoint_error(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """What is unknown, missing or inconsistent is named with the file."""
    keys = gguf_keys(_trained(), "qwen2") | changes
    with pytest.raises(CheckpointError, match=said) as caught:
        _load_gguf(tmp_path, {key: value for key, value in keys.items() if value is not None})
    assert "model.gguf" in str(caught.value)


# GGUF, SentencePiece


def _greedy(text: str, keys: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours that make the best-scored piece first."""
    scores = {t: s for t, s in zip(keys["ggml.tokens"], keys["ggml.scores"], strict=True) if not t.startswith("<")}
    ids = {token: index for index, token in enumerate(keys["ggml.tokens"])}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joins:
            break
        _score, place = min(joins)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _load_gguf(tmp_path_factory.mktemp("spm"), sentence_piece_keys(), gguf_name="llama")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text("helowrd ", max_size=20), st.text(max_size=12)))
def test_sentence_piece_joins_the_best_scores_first(sentence_piece: Tokenizer, text: str) -> None:
    """Ids are those of SentencePiece's own definition, and what no piece has is spelled in bytes."""
    if "<" in text or "▁" in text:
        return
    ids = sentence_piece.encode(text, add_special_tokens=False)
    assert ids == _greedy(text, sentence_piece_keys())
    assert sentence_piece.decode(ids) == text


def test_sentence_piece_begins_with_bos_unless_told_otherwise(tmp_path: Path, sentence_piece: Tokenizer) -> None:
    """These vocabularies expect a beginning token; the file may say no."""
    assert sentence_piece.encode("hello", add_special_tokens=True)[0] == 1
    quiet = _load_gguf(tmp_path, sentence_piece_keys() | {"ggml.add_bos_token": False})
    assert quiet.encode("hello", add_special_tokens=True)[0] != 1


def test_sentence_piece_prefix_can_be_switched_off(tmp_path: Path) -> None:
    """add_space_prefix false: text begins as it is, and its own leading blank survives."""
    tokenizer = _load_gguf(tmp_path, sentence_piece_keys() | {"ggml.add_space_prefix": False})
    for text in ("hello", " hello"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text


def test_control_and_user_defined_tokens_are_one_id_each(sentence_piece: Tokenizer) -> None:
    """</s> and <tool> inside a text are read whole; only the first is left out of the answer's text."""
    ids = sentence_piece.encode("<tool></s>", add_special_tokens=False)
    assert [sentence_piece.token(one) for one in ids] == ["<tool>", "</s>"]
    assert sentence_piece.decode(ids) == "<tool>"


def test_scores_that_do_not_match_are_a_checkpoint_error(tmp_path: Path) -> None:
    """A file with fewer scores than tokens is damaged."""
    with pytest.raises(CheckpointError, match="scores"):
        _load_gguf(tmp_path, sentence_piece_keys() | {"ggml.scores": [0.0]})


# the bundled model


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    file = bundled_model()
    if file is None:
        pytest.skip("the bundled model is not installed")
    return load_tokenizer(make_spec(file, gguf_name="llama"))


@pytest.mark.parametrize("text", _VARIED)
def test_bundled_model_reads_and_writes_any_text(bundled: Tokenizer, text: str) -> None:
    """Chinese, emoji, code and digits survive the way there and back."""
    ids = bundled.encode(text, add_special_tokens=True)
    assert bundled.decode(ids, skip_special_tokens=False) == text


def test_bundled_model_reads_its_turns_as_single_tokens(bundled: Tokenizer) -> None:
    """<|im_start|> is token 1 and <|im_end|>, which ends an answer, token 2; digits stand alone."""
    assert bundled.encode("<|im_start|>", add_special_tokens=False) == [1]
    assert bundled.encode("<|im_end|>", add_special_tokens=False) == [2]
    assert 2 in bundled.eos_token_ids
    assert len(bundled.encode("12345", add_special_tokens=False)) == 5


def test_control_type_is_what_the_format_says() -> None:
    """The numbers of token types in these tests are those of the `gguf` package."""
    import gguf

    assert gguf.TokenType.CONTROL == CONTROL
