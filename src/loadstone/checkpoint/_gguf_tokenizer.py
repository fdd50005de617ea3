"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Knows the `tokenizer.*` keys of the GGUF specification and the two kinds of vocabulary they carry: byte-level
BPE ("gpt2") and SentencePiece BPE with scores and byte fallback ("llama"). Knows nothing of tensors, nor how
the metadata is read: that is `gguf`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.errors import CheckpointError, handle_exceptions

from .gguf import read_metadata

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_NO_TOKEN = 0xFFFFFFFF

# A GGUF file names one token that ends an answer where the Hub's files name several. These mean an end in
# every model that has them as control tokens.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as a GGUF file describes it; `end_ids` are all tokens that end an answer."""

    backend: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class _Splitting:
    """How text is cut into words before merging, as the Hub's tokenizer.json of these models says.

    `pattern` None is GPT-2's own. `adds_bos` holds where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    composes: bool = False  # Unicode NFC first
    ignore_merges: bool = False
    adds_bos: bool = False


_CASELESS_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = _CASELESS_ENDINGS + _WORDS + r"\p{N}" + _REST
_LLAMA = _CASELESS_ENDINGS + _WORDS + r"\p{N}{1,3}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITTINGS: Mapping[str, _Splitting] = {
    "default": _Splitting(),
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "qwen2": _Splitting(_QWEN, composes=True),
    "deepseek-r1-qwen": _Splitting(_QWEN),
    "llama-bpe": _Splitting(_LLAMA, ignore_merges=True, adds_bos=True),
    "llama3": _Splitting(_LLAMA, ignore_merges=True, adds_bos=True),
    "llama-v3": _Splitting(_LLAMA, ignore_merges=True, adds_bos=True),
    "falcon3": _Splitting(_LLAMA, ignore_merges=True),
    "smaug-bpe": _Splitting(_LLAMA),
    "tekken": _Splitting(_TEKKEN, ignore_merges=True, adds_bos=True),
}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file with their types, and its special tokens; everything checked."""

    tokens: Sequence[str]
    types: Sequence[int]
    bos: int | None
    eos: int | None
    unknown: int | None

    @cached_property
    def _special(self) -> list[tuple[str, int]]:
        """The few tokens that are not normal text, with their types."""
        return [(token, kind) for token, kind in zip(self.tokens, self.types, strict=True) if kind != _NORMAL]

    def of_type(self, *types: int) -> list[str]:
        """Return the tokens of these types, none of them normal, in the order of their ids, each once."""
        return list(dict.fromkeys(token for token, kind in self._special if kind in types and token))

    def ids(self, *, without: int | None = None) -> dict[str, int]:
        """Return each token's id, but for those of one type; of equal tokens the first counts."""
        numbered = zip(reversed(self.tokens), reversed(self.types), range(len(self.tokens) - 1, -1, -1), strict=True)
        return {token: index for token, kind, index in numbered if kind != without}

    def text(self, index: int | None) -> str | None:
        """Return the token with this id."""
        return None if index is None else self.tokens[index]


def build_tokenizer(file: Path, architecture: str) -> GgufTokenizer:
    """Build the tokenizer that a GGUF file describes; `architecture` is its `general.architecture`.

    Raises `CheckpointError` when the file has none, has one of an unknown kind, or contradicts itself.
    """
    metadata = read_metadata(file)
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        said = "has no tokenizer" if model is None else f"has a tokenizer of the unknown kind {model!r}"
        raise CheckpointError(
            f"the file {said}; known are gpt2 and llama.",
            file=file,
            hint="Use another conversion of this model, or its safetensors files.",
        )
    vocabulary = _read_vocabulary(metadata, file)
    splitting = _find_splitting(metadata, architecture, file) if model == "gpt2" else None
    with handle_exceptions(f"build the tokenizer of {file}", into=CheckpointError):
        if splitting is None:
            backend = _sentence_piece(metadata, vocabulary)
        else:
            backend = _byte_level(metadata, vocabulary, splitting)
        _add_special(backend, vocabulary)
        adds_bos = splitting is None or splitting.adds_bos
        _add_post_processor(backend, metadata, vocabulary, adds_bos)
    bos, eos = vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos)
    return GgufTokenizer(backend, bos, eos, _end_ids(metadata, vocabulary))


def _read_vocabulary(metadata: Mapping[str, Any], file: Path) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError("tokenizer.ggml.tokens is missing or is not a list of texts.", file=file)
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type does not match tokenizer.ggml.tokens.", file=file)

    def special(name: str) -> int | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None or index == _NO_TOKEN:
            return None
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(f"tokenizer.ggml.{name}_token_id is {index}, of {len(tokens)} tokens.", file=file)
        return index

    return _Vocabulary(tokens, types, special("bos"), special("eos"), special("unknown"))


def _find_splitting(metadata: Mapping[str, Any], architecture: str, file: Path) -> _Splitting:
    # Files from before this key existed say nothing; Qwen's have always been split in the same way.
    name = metadata.get("tokenizer.ggml.pre") or ("qwen2" if architecture.startswith("qwen") else "default")
    if name not in _SPLITTINGS:
        raise CheckpointError(
            f"the text is to be split in the unknown way {name!r} (tokenizer.ggml.pre); "
            f"known are {', '.join(sorted(_SPLITTINGS))}.",
            file=file,
            hint="Use this model's safetensors files, which describe their own splitting.",
        )
    return _SPLITTINGS[name]


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, splitting: _Splitting) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # The second half may itself begin with a space only if the first is not empty, hence the search from 1.
    merges = [(m[: (cut := m.index(" ", 1))], m[cut + 1 :]) for m in metadata["tokenizer.ggml.merges"]]
    # Unused tokens are padding ("[PAD151669]") that no text may become and no answer should show.
    ids = vocabulary.ids(without=_UNUSED)
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.ignore_merges))
    if splitting.composes:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = vocabulary.ids()
    unknown = vocabulary.text(vocabulary.unknown) or next(iter(vocabulary.of_type(_UNKNOWN)), None)
    merges = _merges_from_scores(ids, vocabulary, metadata["tokenizer.ggml.scores"])
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend("▁")] if prefixed else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    return backend


def _merges_from_scores(
    ids: Mapping[str, int], vocabulary: _Vocabulary, scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, the best joined token first.

    SentencePiece keeps no merges: it joins whichever neighbours make the token with the highest score.
    """
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
    normal = {token for token, index in ids.items() if vocabulary.types[index] == _NORMAL}
    ranked: list[tuple[float, int, str, str]] = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[ids[token]], -cut, left, right))
    ranked.sort()
    return [(left, right) for _score, _cut, left, right in ranked]


def _add_special(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    named = [vocabulary.tokens[i] for i in (vocabulary.bos, vocabulary.eos) if i is not None]
    special = dict.fromkeys([*vocabulary.of_type(_CONTROL, _UNKNOWN), *named])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in vocabulary.of_type(_USER_DEFINED) if t not in special]
    )


def _add_post_processor(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], vocabulary: _Vocabulary, adds_bos: bool
) -> None:
    from tokenizers import processors

    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [vocabulary.bos] if adds_bos and vocabulary.bos is not None else []
    after = [vocabulary.eos] if adds_eos and vocabulary.eos is not None else []
    if before or after:
        names = {index: vocabulary.tokens[index] for index in (*before, *after)}
        backend.post_processor = processors.TemplateProcessing(
            single=[*(names[i] for i in before), "$A", *(names[i] for i in after)],
            special_tokens=[(name, index) for index, name in names.items()],
        )


def _end_ids(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[int, ...]:
    found = [index for index in (vocabulary.eos,) if index is not None]
    for name in ("eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(vocabulary.tokens):
            found.append(index)
    control = vocabulary.of_type(_CONTROL)
    ends = [vocabulary.tokens.index(end) for end in _ENDS if end in control]
    found += [index for index in ends if vocabulary.types[index] == _CONTROL]
    return tuple(dict.fromkeys(found))
