"""NF4 codes and absmax are bitsandbytes' own, through the kernels and through plain torch."""

from __future__ import annotations

import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.quantization.codes import NF4
from loadstone.quantization.linear import Nf4Linear
from loadstone.quantization.reference import dequantize_nf4, quantize_nf4

again = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def nf4(*parts: torch.Tensor) -> Nf4Linear:
    made = weights.quantized("4bit", *parts)
    assert isinstance(made, Nf4Linear)
    return made


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_codes_agree_with_bitsandbytes_on_995_bytes_of_a_thousand(dtype: torch.dtype) -> None:
    weight = weights.random(384, 1024, dtype)
    wanted, _ = weights.bitsandbytes_nf4(weight, doubly=True)
    assert weights.same(nf4(weight).codes, wanted) >= 0.995


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
def test_the_reference_agrees_with_bitsandbytes_on_995_bytes_of_a_thousand(dtype: torch.dtype) -> None:
    weight = weights.random(384, 1024, dtype)
    wanted, _ = weights.bitsandbytes_nf4(weight, doubly=False)
    assert weights.same(quantize_nf4(weight)[0], wanted) >= 0.995


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_the_error_is_no_larger_than_bitsandbytes_with_double_quantisation(dtype: torch.dtype) -> None:
    weight = weights.random(384, 1024, dtype)
    _, theirs = weights.bitsandbytes_nf4(weight, doubly=True)
    assert weights.error(weights.whole(nf4(weight)), weight) <= weights.error(theirs, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("kernels")
def test_one_weight_a_million_times_as_large_does_not_cost_the_others_their_precision(dtype: torch.dtype) -> None:
    weight = weights.random(256, 1024)
    weight[17, 100] = 1e6
    weight = weight.to(dtype)
    _, theirs = weights.bitsandbytes_nf4(weight, doubly=True)
    ours = weights.whole(nf4(weight))
    assert weights.error(ours, weight) <= weights.error(theirs, weight)
    others = weight[torch.arange(256) != 17]
    alone = weights.error(weights.whole(nf4(others)), others)
    assert weights.error(ours[torch.arange(256) != 17], others) <= 1.001 * alone


@given(rows=st.integers(1, 70), blocks=st.integers(1, 5), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1, 1e3]))
@again
def test_kernels_and_reference_agree_for_every_shape(rows: int, blocks: int, seed: int, size: float) -> None:
    weight = weights.random(rows, 64 * blocks, seed=seed) * size
    made = nf4(weight)
    codes, absmax = quantize_nf4(weight)
    assert weights.same(made.codes, codes) > 0.995
    torch.testing.assert_close(made.absmax.float() * made.scale, absmax, rtol=1e-3, atol=0)
    torch.testing.assert_close(weights.whole(made), dequantize_nf4(codes, absmax, 1.0), rtol=1e-3, atol=3e-2 * size)


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_the_sixteen_values_come_back_exactly(dtype: torch.dtype) -> None:
    """Weights that are NF4's own values times a power of two lose nothing but their type's rounding."""
    values = torch.tensor(NF4)
    weight = values.repeat(8, 4).mul(0.25).to(dtype)
    torch.testing.assert_close(weights.whole(nf4(weight)), weight.float(), rtol=4e-3, atol=1e-6)
    codes = nf4(weight).codes[0, :8].tolist()
    assert codes == [16 * high + high + 1 for high in range(0, 16, 2)]


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight = weights.random(6, 128, dtype)
    weight[2] = 0
    weight[4, 64:] = 0
    found = weights.whole(nf4(weight))
    assert not found[2].any()
    assert not found[4, 64:].any()
    assert not weights.whole(nf4(torch.zeros(3, 64, dtype=dtype))).any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("largest", [3e38, 1e30, 1e-30])
def test_weights_of_any_size_are_kept_to_within_a_code(largest: float) -> None:
    weight = weights.random(8, 128)
    weight = weight / weight.abs().max() * largest
    found = weights.whole(nf4(weight))
    assert torch.isfinite(found).all()
    assert weights.relative(found, weight) < 0.15


@pytest.mark.usefixtures("kernels")
def test_the_same_weights_give_the_same_bytes_each_time() -> None:
    weight = weights.random(200, 640, torch.bfloat16)
    first, second = nf4(weight), nf4(weight.clone())
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.absmax, second.absmax)
    assert first.scale == second.scale


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_byte(threads: int) -> None:
    weight = weights.random(200, 640, torch.bfloat16)
    wanted = nf4(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = nf4(weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.absmax, wanted.absmax)


@pytest.mark.usefixtures("kernels")
def test_stacked_weights_have_the_codes_of_each() -> None:
    parts = [weights.random(rows, 192, seed=rows) for rows in (33, 16, 7)]
    stacked = nf4(*parts)
    alone = [nf4(part) for part in parts]
    assert torch.equal(stacked.codes, torch.cat([one.codes for one in alone]))
    absmax = torch.cat([one.absmax.float() * one.scale for one in alone])
    torch.testing.assert_close(stacked.absmax.float() * stacked.scale, absmax, rtol=2e-3, atol=0)


@pytest.mark.usefixtures("kernels")
def test_stacked_weights_may_have_different_types() -> None:
    parts = [weights.random(8, 128, dtype, seed=at) for at, dtype in enumerate(weights.DTYPES)]
    wanted = torch.cat([weights.whole(nf4(part)) for part in parts])
    torch.testing.assert_close(weights.whole(nf4(*parts)), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # it copies then, which is all that is asked of it
@pytest.mark.usefixtures("kernels")
def test_weights_that_do_not_lie_in_order_are_read_as_they_are() -> None:
    weight = weights.random(192, 64).T
    assert not weight.is_contiguous()
    assert torch.equal(nf4(weight).codes, nf4(weight.clone(memory_format=torch.contiguous_format)).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_what_is_no_number_spoils_its_block_only_and_is_seen_there(dtype: torch.dtype, bad: float) -> None:
    weight = weights.random(6, 192, dtype)
    wanted = nf4(weight)
    weight[2, 70] = bad
    made = nf4(weight)
    assert torch.isfinite(made.absmax).logical_not().nonzero().tolist() == [[2, 1]]
    found, sound = weights.whole(made), weights.whole(wanted)
    found[2, 64:128] = sound[2, 64:128] = 0
    torch.testing.assert_close(found, sound, rtol=2e-3, atol=0)
