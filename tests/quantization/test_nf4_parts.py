"""What `4bit` keeps embedding and head in: 8 bits, unless a variant of it says otherwise."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
import weights

from loadstone.quantization import nf4
from loadstone.quantization.four_bits import Kept
from loadstone.quantization.linear import DenseLinear, Int8Linear, Linear, Nf4Linear
from loadstone.quantization.nf4 import Nf4

KEPT = get_args(Kept)
FORMS: dict[str, type[Linear]] = {"none": DenseLinear, "8bit": Int8Linear, "4bit": Nf4Linear}
each_part = pytest.mark.parametrize("part", ["embedding", "lm_head"])
each_kept = pytest.mark.parametrize("kept", KEPT)


def variant(part: str, kept: Kept) -> Nf4:
    """Return `4bit` with one part kept another way."""
    return Nf4("variant", embedding=kept) if part == "embedding" else Nf4("variant", lm_head=kept)


def made(strategy: Nf4, part: str, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> Linear:
    return strategy.quantize(part, [weight], weights.CPU, dtype)


@each_part
def test_embedding_and_head_are_kept_in_8_bits(part: str) -> None:
    assert isinstance(made(Nf4(), part, weights.random(8, 64)), Int8Linear)


@each_part
@each_kept
def test_a_variant_keeps_the_part_that_it_names_in_its_form(part: str, kept: Kept) -> None:
    assert isinstance(made(variant(part, kept), part, weights.random(8, 64)), FORMS[kept])


@each_part
@each_kept
def test_a_variant_of_one_part_leaves_the_other_as_it_was(part: str, kept: Kept) -> None:
    other = {"embedding": "lm_head", "lm_head": "embedding"}[part]
    assert isinstance(made(variant(part, kept), other, weights.random(8, 64)), Int8Linear)


@each_kept
@pytest.mark.parametrize("columns", [128, 100])
def test_weight_bytes_of_a_variant_are_those_of_its_tensors(kept: Kept, columns: int) -> None:
    strategy, weight = variant("lm_head", kept), weights.random(30, columns, torch.bfloat16)
    assert strategy.weight_bytes("lm_head", 30, columns, dtype_bytes=2) == made(strategy, "lm_head", weight).nbytes


@each_part
@each_kept
def test_what_its_tensors_and_facts_make_is_the_same_weight(part: str, kept: Kept) -> None:
    """As the store keeps it and gives it back."""
    strategy = variant(part, kept)
    first = made(strategy, part, weights.random(30, 128))
    second = strategy.restore(part, first.tensors(), first.facts, torch.float32)
    assert type(second) is type(first)
    assert torch.equal(weights.whole(second), weights.whole(first))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
def test_an_embedding_in_4_bits_is_looked_up_as_its_dequantised_rows(dtype: torch.dtype) -> None:
    linear = made(variant("embedding", "4bit"), "embedding", weights.random(50, 128), dtype)
    found = linear.lookup(torch.tensor([49, 0, 7, 7]))
    assert found.dtype == dtype
    torch.testing.assert_close(found, linear.dequantize(0, 50, dtype)[[49, 0, 7, 7]])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_variant_has_a_layout_of_its_own(kind: str) -> None:
    """Or the store would hand one variant's weights to another."""
    ways = list(product(KEPT, KEPT))
    assert len({Nf4("variant", embedding=embedding, lm_head=head).layout(kind) for embedding, head in ways}) == len(
        ways
    )


def test_the_layout_is_what_entries_of_the_store_were_made_with(kernels: str) -> None:
    """Another name makes every entry anew; change it with the bytes, and only then."""
    is_turned = kernels == "kernels" and nf4.wide_kernels() is not None
    on_cpu = "nf4-64-absmax16-turned-1+int8-rows-turned-1" if is_turned else "nf4-64-absmax16-1+int8-rows-1"
    assert Nf4().layout("cpu") == on_cpu
    assert Nf4().layout("cuda") == "bitsandbytes-nf4-double-1+int8-rows-1"
