"""The files of one model at one revision: their headers, weights, tokenizer and chat template."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .architectures import Architecture, known_architectures, register_architecture
from .inspect import inspect
from .opening import Readable
from .spec import ModelSpec, TensorInfo
from .weights import Weights, open_weights

if TYPE_CHECKING:
    from .template import ChatTemplate as ChatTemplate
    from .template import load_chat_template as load_chat_template
    from .tokenizer import Tokenizer as Tokenizer
    from .tokenizer import load_tokenizer as load_tokenizer
    from .tokenizer import prepare_tokenizers as prepare_tokenizers

__all__ = [
    "Architecture",
    "ChatTemplate",
    "ModelSpec",
    "Readable",
    "TensorInfo",
    "Tokenizer",
    "Weights",
    "inspect",
    "known_architectures",
    "load_chat_template",
    "load_tokenizer",
    "open_weights",
    "prepare_tokenizers",
    "register_architecture",
]

# Text needs libraries (tokenizers, jinja2) that looking at headers does not.
_LATER = {
    "ChatTemplate": ".template", "load_chat_template": ".template",
    "Tokenizer": ".tokenizer", "load_tokenizer": ".tokenizer", "prepare_tokenizers": ".tokenizer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
