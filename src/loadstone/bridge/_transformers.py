"""The one place that knows transformers: its classes made from what our headers, tokenizer and configuration say.

Imported only when a transformers model is asked for, because importing transformers takes over a second.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, PreTrainedTokenizerFast

from loadstone.checkpoint.spec import ModelSpec
from loadstone.checkpoint.template import ChatTemplate
from loadstone.checkpoint.tokenizer import Tokenizer, read_settings, token_text
from loadstone.config import Sampling
from loadstone.errors import ConfigurationError, ModelLoadError

from .lent import Loan
from .saving import DEFAULT_SHARD, save

if TYPE_CHECKING:
    import tokenizers

__all__ = ["PreTrainedModel", "PreTrainedTokenizerFast", "make_model", "make_tokenizer", "set_generation"]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKENIZER_SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names",
)  # fmt: skip


class _Saved:
    """A model whose weights are lent: it writes them as they are kept."""

    spec: ModelSpec
    loan: Loan

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True,
        max_shard_size: int | str = DEFAULT_SHARD, **settings: Any,
    ) -> None:  # fmt: skip
        """Write a checkpoint that transformers loads again; see `loadstone.bridge.saving.save`.

        An adapter that was added with `add_adapter` is written in the way of transformers, and alone.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, max_shard_size=max_shard_size, **settings)  # type: ignore[misc]
        elif is_main_process:
            save(
                self.config, self.generation_config, self.loan, self.spec, save_directory, max_shard_size, settings
            )  # fmt: skip


def make_model(spec: ModelSpec, loan: Loan) -> PreTrainedModel:
    """Return transformers' model of this kind, with the weights that are lent; it takes no memory of its own.

    Raises ConfigurationError where transformers does not know the architecture, and ModelLoadError where its model has
    other weights than ours.
    """
    config = _config_of(spec)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise _not_known(spec)
    with torch.device("meta"):
        make: Any = _class_of(kind)._from_config
        model = make(config, dtype=loan.dtype)
    for name, weight in loan.lend().items():
        _put(model, name, weight)
    _make_buffers(model)
    model.tie_weights()
    left = [name for name, one in (*model.named_parameters(), *model.named_buffers()) if one.is_meta]
    if left:
        raise ModelLoadError(
            f"transformers' {kind.__name__} has weights that our decoder has not: {', '.join(left[:4])}"
        )
    model.spec, model.loan = spec, loan
    made: PreTrainedModel = model.eval()
    return made


def _put(model: Any, name: str, weight: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    there = module._parameters.get(leaf)
    if there is None or there.shape != weight.shape:
        shape = "none" if there is None else tuple(there.shape)
        raise ModelLoadError(f"{name} is {tuple(weight.shape)} in our decoder; transformers' model has {shape} there")
    module._parameters[leaf] = torch.nn.Parameter(weight, requires_grad=False)


def _make_buffers(model: Any) -> None:
    """Make anew, with memory, the modules that have no weights but buffers: those that rotate positions."""
    for path, module in [*model.named_modules()]:
        own = [*module.named_buffers(recurse=False)]
        if own and not [*module.parameters()] and all(buffer.is_meta for _, buffer in own):
            model.set_submodule(path, type(module)(config=model.config))


@cache
def _class_of(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return `kind`, under its own name, with our way to save it."""
    return type(kind.__name__, (_Saved, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _config_of(spec: ModelSpec) -> Any:
    said = {name: value for name, value in spec.config.items() if name not in ("auto_map", "quantization_config")}
    if spec.format == "gguf":
        said["rope_parameters"] = _rope_of(spec)
    if spec.architecture.name not in CONFIG_MAPPING:
        raise _not_known(spec)
    config = CONFIG_MAPPING[spec.architecture.name].from_dict(said)
    config.name_or_path = _name_of(spec)
    return config


def _name_of(spec: ModelSpec) -> str:
    """Return what others find the checkpoint by: its name on a hub, or its folder."""
    return spec.name if "/" in spec.name else str(spec.folder)


def _rope_of(spec: ModelSpec) -> dict[str, Any]:
    """Return how positions are rotated, as transformers says it: "factors" are what its longrope divides by."""
    rope = dict(spec.rope)
    if rope["rope_type"] == "factors":
        factors = list(rope.pop("factors"))
        rope |= {
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
            "factor": 1.0, "original_max_position_embeddings": spec.max_context,
        }  # fmt: skip
    return rope


def _not_known(spec: ModelSpec) -> ConfigurationError:
    return ConfigurationError(
        f"transformers {transformers.__version__} has no model of the architecture {spec.architecture.name!r}",
        hint="manager.load() needs no transformers.",
    )


def set_generation(model: Any, sampling: Sampling, tokenizer: Tokenizer, pad: int | None) -> None:
    """Have `model.generate` begin with the sampling that is in force here; greedy where it is.

    What transformers has no setting for (`stop` without a tokenizer, presence and frequency penalties) is left out.
    """
    chosen: dict[str, Any] = {}
    if not sampling.greedy:
        chosen = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
        }  # fmt: skip
    ends = [*tokenizer.eos_token_ids]
    bos = None if tokenizer.bos_token is None else tokenizer.backend.token_to_id(tokenizer.bos_token)
    make: Any = transformers.GenerationConfig
    model.generation_config = make(
        do_sample=not sampling.greedy, max_new_tokens=sampling.max_new_tokens, bos_token_id=bos,
        repetition_penalty=sampling.repetition_penalty, eos_token_id=ends or None,
        pad_token_id=ends[0] if pad is None and ends else pad, **chosen,
    )  # fmt: skip


def make_tokenizer(spec: ModelSpec, ours: Tokenizer, template: ChatTemplate | None) -> PreTrainedTokenizerFast:
    """Return transformers' tokenizer over the same vocabulary, with the checkpoint's special tokens and template.

    It pads on the left where the checkpoint does not say: what a model goes on with must not be padding.
    """
    settings = {
        **read_settings(spec.folder / "special_tokens_map.json"),
        **read_settings(spec.folder / "tokenizer_config.json"),
    } if spec.format != "gguf" else {}  # fmt: skip
    said: dict[str, Any] = {name: settings[name] for name in _TOKENIZER_SETTINGS if settings.get(name) is not None}
    tokens = {name: token_text(settings.get(name)) for name in _NAMED_TOKENS}
    tokens |= {"bos_token": ours.bos_token, "eos_token": ours.eos_token}
    said |= {name: text for name, text in tokens.items() if text is not None}
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    if isinstance(more, list):
        said["extra_special_tokens"] = [text for one in more if (text := token_text(one)) is not None]
    if template is not None:
        said["chat_template"] = template.source
    made: Any = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    made._tokenizer = _own(ours.backend)  # or a whole copy would be made of it
    made.__init__(**{"padding_side": "left", **said})
    made.name_or_path = _name_of(spec)
    tokenizer: PreTrainedTokenizerFast = made
    return tokenizer


def _own(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer over the same vocabulary in memory, whose padding and added tokens are its own."""
    made = type(backend)(backend.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (part := getattr(backend, name)) is not None:
            setattr(made, name, part)
    added = backend.get_added_tokens_decoder()
    made.add_tokens([added[index] for index in sorted(added)])
    return made
