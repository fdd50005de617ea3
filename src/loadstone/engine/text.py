"""Turns tokens into text as they come, in whole characters.

Knows how byte-level and SentencePiece vocabularies spell bytes; any other is decoded over a short window.
Each token costs the same, however long the text has become. Knows nothing of stop strings or of who reads.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

from loadstone.checkpoint.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8  # tokens; no character is spelled with more


class TextStream:
    """Decodes one answer, token by token.

    `push` returns the characters that a token completes, `flush` what is left when there are no more tokens,
    with U+FFFD for an incomplete character. Together they are what `Tokenizer.decode` makes of all tokens but
    the special ones. One difference is meant: where a SentencePiece vocabulary spells bytes that are not all
    UTF-8, `decode` makes U+FFFD of every one, and here the whole characters among them survive.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        decoder = _describe(tokenizer.backend.decoder)
        if decoder == {"type": "ByteLevel"}:
            self._decoding: _Decoding = _Bytes(_byte_level)
        elif (pieces := _sentence_piece(decoder)) is not None:
            self._decoding = pieces
        else:
            self._decoding = _Window(tokenizer)

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes, which may be none."""
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._special:
            return ""
        return self._decoding.push(token_id, token)

    def flush(self) -> str:
        """Return what is left, and make the stream ready for another answer."""
        return self._decoding.flush()


def token_bytes(tokenizer: Tokenizer, count: int) -> list[bytes] | None:
    """Return the bytes that each of the first `count` tokens stands for; none for those that stand for no text.

    None where the vocabulary spells them in no way that is known here.
    """
    stream = TextStream(tokenizer)
    if not isinstance(stream._decoding, _Bytes):
        return None
    spelled = (tokenizer.backend.id_to_token(token) for token in range(count))
    return [b"" if one is None or one in stream._special else stream._decoding.spell(one) for one in spelled]


class _Decoding(Protocol):
    def push(self, token_id: int, token: str) -> str: ...

    def flush(self) -> str: ...


class _Bytes:
    """Decodes tokens whose spelling says their bytes; `strip` blanks are taken from the text's start."""

    def __init__(self, spell: Callable[[str], bytes], strip: int = 0) -> None:
        self.spell = spell
        self._strip = strip
        self._left_to_strip = strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        return self._stripped(self._decoder.decode(self.spell(token)))

    def flush(self) -> str:
        text = self._stripped(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._left_to_strip = self._strip
        return text

    def _stripped(self, text: str) -> str:
        while self._left_to_strip and text:
            if text[0] != " ":
                self._left_to_strip = 0
            else:
                text = text[1:]
                self._left_to_strip -= 1
        return text


class _Window:
    """Decodes with the tokenizer: the last tokens with and without the new ones, and takes the difference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._new.append(token_id)
        text = self._text()
        if not text or (text.endswith(_BROKEN) and len(self._new) < _WINDOW):
            return ""
        self._before = [*self._before, *self._new][-_WINDOW:]
        self._new = []
        return text

    def flush(self) -> str:
        text = self._text()
        self._before, self._new = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._new])[len(before) :]


def _describe(decoder: Any) -> Any:
    """Return a backend's decoder as tokenizer.json writes it, without what does not change how it decodes."""
    if decoder is None:
        return None
    found = json.loads(decoder.__getstate__())
    if found.get("type") == "Sequence" and len(found["decoders"]) == 1:
        found = found["decoders"][0]
    return {"type": "ByteLevel"} if found.get("type") == "ByteLevel" else found


def _sentence_piece(decoder: Any) -> _Bytes | None:
    """Return the decoding for "replace, fall back to bytes, fuse, perhaps strip"; None for any other."""
    if not decoder or decoder.get("type") != "Sequence":
        return None
    steps = list(decoder["decoders"])
    replaced: list[tuple[str, str]] = []
    while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
        replaced.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        steps.pop(0)
    if [step["type"] for step in steps[:2]] != ["ByteFallback", "Fuse"]:
        return None
    strip = 0
    if len(steps) > 2:
        last = steps[2]
        if len(steps) > 3 or last["type"] != "Strip" or last["content"] != " " or last["stop"]:
            return None
        strip = last["start"]

    def spell(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        return _fallen_back(token)

    return _Bytes(spell, strip)


def _fallen_back(token: str) -> bytes:
    """Return the bytes of a token that is a text, or one byte written as <0x0A>."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode("utf-8")


def _byte_level(token: str) -> bytes:
    """Return the bytes of a token spelled in GPT-2's alphabet; added tokens outside it are plain text."""
    alphabet = _alphabet()
    try:
        return bytes(map(alphabet.__getitem__, token))
    except KeyError:
        return token.encode("utf-8")


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
