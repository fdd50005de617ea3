"""Text to token ids and back, as the checkpoint's own tokenizer does it.

Knows tokenizer.json with tokenizer_config.json beside it, and leaves GGUF's metadata to `_gguf_tokenizer`.
Knows nothing of conversations (that is `template`) and nothing of streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.errors import CheckpointError, ConfigurationError, handle_exceptions

from .config_json import read_json
from .spec import ModelSpec

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    `backend` is the `tokenizers.Tokenizer` that does the work. `eos_token_ids` are all the tokens that end an
    answer, which are often more than `eos_token`.
    """

    backend: tokenizers.Tokenizer
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`.

        Special tokens written out in the text are read as such. `add_special_tokens` adds those that the
        checkpoint puts around every text (often a beginning-of-text token); a rendered chat template has them
        already.
        """
        # A lone surrogate is no character and has no UTF-8; it becomes the replacement character.
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.backend.encode(clean, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids that the tokenizer does not know are passed over."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; raises `ConfigurationError` for an unknown id."""
        found = self.backend.id_to_token(token_id) if token_id >= 0 else None
        if found is None:
            raise ConfigurationError(f"There is no token {token_id}; the tokenizer has {self.vocab_size} tokens.")
        return found


def prepare_tokenizers() -> None:
    """Bring in what `load_tokenizer` needs of the system's loader, which may be busy with torch's library later."""
    from tokenizers import models

    models.BPE()  # its first hash map looks for the system's function for random numbers


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Raises `CheckpointError` when it is missing, broken, or of a kind that is not read.
    """
    if spec.format == "gguf":
        from ._gguf_tokenizer import build_tokenizer

        built = build_tokenizer(gguf_file(spec), spec.architecture.gguf_name)
        ends = tuple(dict.fromkeys((*spec.eos_token_ids, *built.end_ids)))
        return Tokenizer(built.backend, built.bos_token, built.eos_token, ends)
    backend = _read_tokenizer_json(spec.folder)
    settings = read_settings(spec.folder / "tokenizer_config.json")
    _add_missing_tokens(backend, settings)
    bos, eos = token_text(settings.get("bos_token")), token_text(settings.get("eos_token"))
    if settings.get("add_bos_token") is True and bos is not None:
        _begin_with(backend, bos)
    known = [] if eos is None else [backend.token_to_id(eos)]
    ends = tuple(dict.fromkeys((*spec.eos_token_ids, *(one for one in known if one is not None))))
    return Tokenizer(backend, bos, eos, ends)


def gguf_file(spec: ModelSpec) -> Path:
    """Return the file that holds a GGUF checkpoint's metadata: the only one, or the first of several."""
    files = sorted({tensor.file for tensor in spec.tensors.values()})
    if not files:
        raise CheckpointError("the checkpoint has no tensors, so its metadata cannot be found.", file=spec.folder)
    return files[0]


def read_settings(file: Path) -> Mapping[str, Any]:
    """Read a JSON file of settings, or nothing when there is none; raise `CheckpointError` if it is bad."""
    return read_json(file) if file.exists() else {}


def token_text(value: Any) -> str | None:
    """Return a special token's text; it is written as a text or as {"content": text}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        other = next((n for n in ("tokenizer.model", "vocab.json") if (folder / n).is_file()), None)
        why = f" ({other} alone is not read)" if other else ""
        raise CheckpointError(
            f"there is no tokenizer.json{why}.",
            file=folder,
            hint="Put the model's tokenizer.json there, or write it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
        )
    with handle_exceptions(f"read {file}", into=CheckpointError):
        backend = Backend.from_file(str(file))
    # Some files carry settings of a training run, which would cut or lengthen what users say.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_missing_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json knows, in the order of their ids."""
    from tokenizers import AddedToken

    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    entries = [(int(key), entry) for key, entry in listed.items() if str(key).isdecimal()]
    for index, entry in sorted(entries, key=lambda pair: pair[0]):
        text = token_text(entry)
        # A new token gets the next free id, so one that says another id cannot be had and is left out.
        if text is None or backend.token_to_id(text) is not None or index != backend.get_vocab_size():
            continue
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
        special = entry.get("special") is True
        backend.add_tokens([AddedToken(text, special=special, **flags)])


def _begin_with(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Make the backend begin every text with `bos`, where its own file does not do so already."""
    from tokenizers import processors

    index = backend.token_to_id(bos)
    if index is None or backend.encode("", add_special_tokens=True).ids[:1] == [index]:
        return
    template = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, index)])
    own = backend.post_processor
    backend.post_processor = template if own is None else processors.Sequence([own, template])
