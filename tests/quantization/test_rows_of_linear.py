"""Rows of a weight as a weight of their own: the same numbers, the same memory; and products backwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import weights
from hypothesis import given, settings
from hypothesis import strategies as st

from loadstone.quantization._bitsandbytes import BitsandbytesNf4
from loadstone.quantization.int4_linear import ReorderedLinear
from loadstone.quantization.linear import Linear, Rows

ROWS, COLUMNS = 96, 256
FORMS: dict[str, Callable[[], Linear]] = {
    "none": lambda: weights.quantized("none", weights.random(ROWS, COLUMNS)),
    "bfloat16": lambda: weights.quantized("none", weights.random(ROWS, COLUMNS, torch.bfloat16)),
    "8bit": lambda: weights.quantized("8bit", weights.random(ROWS, COLUMNS)),
    "embedding": lambda: weights.quantized("8bit", weights.random(ROWS, COLUMNS), part="embedding"),
    "4bit": lambda: weights.quantized("4bit", weights.random(ROWS, COLUMNS)),
    "int4": lambda: weights.quantized("int4", weights.random(ROWS, COLUMNS)),
    "reordered": lambda: _reordered(),
    "bitsandbytes": lambda: BitsandbytesNf4.quantize(weights.random(ROWS, COLUMNS)),
}


def _reordered() -> Linear:
    """Return a weight as GPTQ's act-order leaves it."""
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    return ReorderedLinear(FORMS["int4"](), order)


each_form = pytest.mark.parametrize("form", FORMS)
X = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))


def _storages(linear: Linear) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in linear.tensors().values() if tensor.numel() > 256}


@each_form
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 96), (16, 21), (5, 90)])
def test_they_are_the_rows_of_the_whole(kernels: str, form: str, start: int, stop: int) -> None:
    whole = FORMS[form]()
    part = whole.part(start, stop)
    assert (part.rows, part.columns) == (stop - start, COLUMNS)
    assert torch.equal(weights.whole(part), weights.whole(whole)[start:stop])
    assert weights.relative(part(X), whole(X)[:, start:stop]) < 5e-3  # where aten multiplies it is in bfloat16


@each_form
def test_no_number_is_copied(form: str) -> None:
    whole = FORMS[form]()
    assert _storages(whole.part(64, 96)) <= _storages(whole)


@each_form
def test_all_rows_are_the_weight_itself(form: str) -> None:
    whole = FORMS[form]()
    assert whole.part(0, ROWS) is whole


@pytest.mark.parametrize("form", ["none", "8bit", "4bit", "int4", "reordered"])
def test_groups_of_sixteen_keep_the_form_that_is_multiplied_fast(form: str) -> None:
    whole = FORMS[form]()
    assert type(whole.part(32, 96)) is type(whole)
    assert type(whole.part(32, 83)) is type(whole)


def test_rows_that_share_a_scale_with_others_are_dequantised() -> None:
    assert isinstance(FORMS["bitsandbytes"]().part(16, 32), Rows)


@pytest.mark.parametrize(("start", "stop"), [(0, 97), (-1, 3), (5, 5), (9, 4)])
def test_rows_that_are_not_there_are_an_error(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="96"):
        FORMS["4bit"]().part(start, stop)


@pytest.mark.parametrize("form", ["8bit", "embedding", "4bit", "int4", "none"])
@pytest.mark.parametrize("start", [0, 16, 7])
def test_looked_up_rows_are_counted_from_the_first(form: str, start: int) -> None:
    whole = FORMS[form]()
    ids = torch.tensor([0, 5, 11])
    assert torch.equal(whole.part(start, start + 32).lookup(ids), whole.lookup(ids + start))


@each_form
def test_the_product_backwards_is_the_dequantised_weights(kernels: str, form: str) -> None:
    linear = FORMS[form]()
    y = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(2))
    assert weights.relative(linear.multiply_back(y), y @ weights.whole(linear)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(["8bit", "4bit", "int4", "none"]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_parts_side_by_side_are_the_whole(form: str, sizes: list[int], seed: int) -> None:
    """However a stack is divided, its parts' products are the columns of the whole one's."""
    whole = weights.quantized(form, weights.random(sum(sizes), 64, seed=seed))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts = [whole.part(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.cat([weights.whole(part) for part in parts]), weights.whole(whole))
    assert weights.relative(torch.cat([part(x) for part in parts], -1), whole(x)) < 5e-3
