"""The 8-bit numbers are those of bitsandbytes' row-wise quantiser."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.quantization import int8
from loadstone.quantization.linear import Int8Linear

columns_of = st.sampled_from([64, 128, 192]) | st.integers(1, 200)


def made(*parts: torch.Tensor) -> Int8Linear:
    linear = weights.quantized("8bit", *parts)
    assert isinstance(linear, Int8Linear)
    return linear


@pytest.mark.parametrize("columns", [1000, 1024])
@pytest.mark.usefixtures("kernels")
def test_numbers_and_scales_agree_with_bitsandbytes(columns: int) -> None:
    weight = weights.random(300, columns, torch.float16)
    numbers, largest, _ = bitsandbytes.int8_vectorwise_quant(weight)
    ours = made(weight)
    assert weights.same(ours.weight, numbers) >= 0.995
    assert int((ours.weight.int() - numbers.int()).abs().max()) <= 1
    torch.testing.assert_close(ours.scales * 127, largest.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [320, 333])
@pytest.mark.usefixtures("kernels")
def test_no_number_is_off_by_more_than_half_a_step(dtype: torch.dtype, columns: int) -> None:
    weight = weights.random(120, columns, dtype)
    ours = made(weight)
    off = (weights.whole(ours) - weight.float()).abs()
    assert bool((off <= ours.scales[:, None] * 0.5001).all())


@pytest.mark.usefixtures("kernels")
@given(rows=st.integers(1, 60), columns=columns_of, size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_largest_of_each_row_becomes_127(rows: int, columns: int, size: float) -> None:
    weight = weights.random(rows, columns) * size
    assert made(weight).weight.int().abs().amax(-1).tolist() == [127] * rows


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
def test_kernels_and_torch_give_the_same_bytes(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    weight = weights.random(77, 320, dtype)
    found = made(weight)
    request.getfixturevalue("no_kernels")
    wanted = made(weight)
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_byte(threads: int) -> None:
    weight = weights.random(101, 320, torch.bfloat16)
    wanted = made(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = made(weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("columns", [96, 128])
@pytest.mark.usefixtures("kernels")
def test_rows_of_zeros_stay_zeros(columns: int) -> None:
    weight = weights.random(5, columns)
    weight[3] = 0
    found = weights.whole(made(weight))
    assert not found[3].any()
    assert found[2].any()


@pytest.mark.parametrize("columns", [96, 128])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("kernels")
def test_a_row_that_holds_no_number_is_seen_in_its_scale(columns: int, bad: float) -> None:
    weight = weights.random(5, columns)
    weight[3, 7] = bad
    found = made(weight)
    assert torch.isfinite(found.scales).tolist() == [True, True, True, False, True]
    assert torch.equal(found.weight[4], made(weight[4:]).weight[0])


@pytest.mark.parametrize("columns", [100, 128])
@pytest.mark.usefixtures("kernels")
def test_stacked_weights_have_the_numbers_of_each(columns: int) -> None:
    parts = [weights.random(rows, columns, dtype) for rows, dtype in zip((33, 16, 7), weights.DTYPES, strict=True)]
    stacked, alone = made(*parts), [made(part) for part in parts]
    assert torch.equal(stacked.weight, torch.cat([one.weight for one in alone]))
    assert torch.equal(stacked.scales, torch.cat([one.scales for one in alone]))


def test_how_many_rows_are_widened_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights.random(57, 200, torch.bfloat16)  # no whole blocks: torch rounds it
    wanted = made(weight)
    monkeypatch.setattr(int8, "CHUNK", 1000)
    found = made(weight)
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.scales, wanted.scales)
