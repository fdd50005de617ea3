"""Transformers' tokenizer and model over what is loaded already: the decoder's weights, our tokenizer, our sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from loadstone.checkpoint.spec import ModelSpec
from loadstone.checkpoint.template import ChatTemplate
from loadstone.checkpoint.tokenizer import Tokenizer
from loadstone.config import Sampling
from loadstone.errors import ConfigurationError, handle_exceptions
from loadstone.model import Decoder
from loadstone.model.recipe import taken_apart
from loadstone.startup import uncollected

from .lent import Loan

if TYPE_CHECKING:
    from ._transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Bridge:
    """A tokenizer and a model of transformers over a decoder's weights, until it is taken down.

    After `end` nothing of the decoder is held, and using the model is a ModelNotLoadedError.
    """

    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    loan: Loan

    def end(self) -> None:
        """Let go of all weights."""
        self.loan.end()


def build_bridge(
    spec: ModelSpec, decoder: Decoder, tokenizer: Tokenizer, template: ChatTemplate | None, sampling: Sampling,
    used: Callable[[int], object],
) -> Bridge:  # fmt: skip
    """Return the bridge; `used` is called for each look-up of tokens, with their number.

    Raises ConfigurationError where transformers is not installed, or does not know the architecture.
    """
    if find_spec("transformers") is None:
        raise ConfigurationError(
            "load_base_model() gives a model of transformers, which is not installed.",
            hint='Install it (`pip install "loadstone[transformers]"`), or use manager.load(), which needs none.',
        )
    with handle_exceptions("make a transformers model of it"), uncollected():
        from . import _transformers

        loan = Loan(taken_apart(spec, decoder), decoder.dtype, decoder.device, used)
        model = _transformers.make_model(spec, loan)
        theirs = _transformers.make_tokenizer(spec, tokenizer, template)
        _transformers.set_generation(model, sampling, tokenizer, theirs.pad_token_id)
        return Bridge(theirs, model, loan)
