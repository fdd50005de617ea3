"""Transformers' model over our weights says what our decoder says, for every architecture and strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from pairs import VARIANTS

NOISE = 2e-4  # of the largest logit: float32's rounding, in another order, through a few layers
IDS = tiny.prompt(100)


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dynamic-positions"])
def test_logits_are_our_decoders(seen: Callable[..., Any], variant: str) -> None:
    one = seen(variant)
    assert tiny.difference(_logits(one.model, IDS), one.decoder.logits(IDS)) < NOISE


@pytest.mark.parametrize("strategy", ["8bit", "4bit", "int4"])
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3", "mistral-window", "llama-biases", "odd-sizes"])
def test_logits_are_our_decoders_where_weights_are_quantised(
    seen: Callable[..., Any], variant: str, strategy: str
) -> None:
    """Our products scale activations in blocks, and stacked rows see the same ones: only rounding differs."""
    one = seen(variant, strategy)
    assert tiny.difference(_logits(one.model, IDS), one.decoder.logits(IDS)) < 2e-3


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3"])
def test_it_generates_what_a_loop_over_our_decoder_does(seen: Callable[..., Any], variant: str) -> None:
    one, ids = seen(variant, "4bit"), IDS[:10]
    with torch.inference_mode():
        found = one.model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
    wanted = list(ids)
    for _ in range(12):
        wanted.append(int(one.decoder.logits(wanted)[-1].argmax()))
    assert found == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_is_the_checkpoints(seen: Callable[..., Any], variant: str) -> None:
    """Each under its own name, rows of what is stacked among them; unquantised ones are the very numbers."""
    one, theirs = seen(variant), dict(tiny.reference(seen(variant).folder).named_parameters())
    mine = dict(one.model.named_parameters())
    assert list(mine) == list(theirs)
    for name, parameter in theirs.items():
        assert torch.equal(mine[name] + 0, parameter), name


def test_a_tied_head_is_its_embedding(seen: Callable[..., Any]) -> None:
    model = seen("qwen2-tied", "4bit").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_is_of_transformers_own_class(seen: Callable[..., Any]) -> None:
    from transformers import PreTrainedModel, Qwen2ForCausalLM

    model = seen("qwen2").model
    assert isinstance(model, Qwen2ForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


def test_a_batch_with_padding_is_answered_as_each_alone(seen: Callable[..., Any]) -> None:
    model = seen("qwen2", "4bit").model
    long, short = IDS[:9], IDS[20:25]
    ids = torch.tensor([long, [0] * 4 + short])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 9:]
    alone = [model.generate(torch.tensor([one]), **settings)[0, len(one) :] for one in (long, short)]
    assert torch.equal(together, torch.stack(alone))
