"""What `int4` makes of weights: sixteen numbers at equal distances over each block of 64."""

from __future__ import annotations

import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.quantization.aten_int4 import AtenInt4Linear
from loadstone.quantization.codes import RANGES, ZERO_STEPS
from loadstone.quantization.reference import quantize_int4

again = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def int4(*parts: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weights as they are after quantising."""
    return weights.whole(weights.quantized("int4", *parts, dtype=dtype))


def numbers_of(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack((codes >> 4, codes & 15), -1).flatten(1).float()


@given(rows=st.integers(1, 40), blocks=st.integers(1, 4), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1, 1e3]))
@again
def test_a_code_is_the_nearest_number_that_the_block_has(rows: int, blocks: int, seed: int, size: float) -> None:
    weight = weights.random(rows, 64 * blocks, seed=seed) * size
    codes, scales, zeros = quantize_int4(weight)
    assert torch.equal(zeros, (zeros * ZERO_STEPS).round().clamp(0, 15 * ZERO_STEPS) / ZERO_STEPS)
    steps = torch.arange(16) - zeros.unsqueeze(-1)  # rows × blocks × 16
    offered = (steps * scales.unsqueeze(-1)).unsqueeze(2)
    least = (weight.view(rows, blocks, 64, 1) - offered).abs().amin(-1)
    kept = (numbers_of(codes).view(rows, blocks, 64) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    off = (weight.view(rows, blocks, 64) - kept).abs()
    assert bool((off <= least + 1e-5 * scales.unsqueeze(-1)).all())


@given(seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1, 1e3]))
@again
def test_no_other_range_that_is_tried_has_a_smaller_error(seed: int, size: float) -> None:
    """Errors are weighed by the weights' own magnitudes: what is large matters more."""
    weight = weights.random(5, 64, seed=seed) * size
    codes, scales, zeros = quantize_int4(weight)
    best = ((numbers_of(codes) - zeros) * scales - weight).square().mul(weight.abs()).sum(-1)
    for below, above in RANGES:
        low, high = -weight.amin(-1, keepdim=True) * below, weight.amax(-1, keepdim=True) * above
        scale = (high + low) / 15
        zero = (low / scale * ZERO_STEPS).round() / ZERO_STEPS
        found = (weight / scale + zero).round().clamp(0, 15).sub(zero).mul(scale)
        assert bool((best <= (found - weight).square().mul(weight.abs()).sum(-1) * 1.001).all())


@given(rows=st.integers(1, 70), blocks=st.integers(1, 5), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1, 1e3]))
@again
@pytest.mark.usefixtures("kernels")
def test_kernels_and_reference_agree_for_every_shape(rows: int, blocks: int, seed: int, size: float) -> None:
    weight = weights.random(rows, 64 * blocks, seed=seed) * size
    codes, scales, zeros = quantize_int4(weight)
    wanted = (numbers_of(codes).view(rows, blocks, 64) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)
    made = weights.quantized("int4", weight)
    rounded = 2**-7 if isinstance(made, AtenInt4Linear) else 2**-10  # of aten's scales, and of ours
    torch.testing.assert_close(
        weights.whole(made), wanted.view(rows, -1), rtol=rounded, atol=16 * rounded * float(scales.max())
    )


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_no_weight_is_off_by_more_than_a_tenth_of_the_range(dtype: torch.dtype) -> None:
    """Of which a step is a fifteenth: half of it is rounding, and a tenth of a side may be cut off."""
    weight = weights.random(128, 1024, dtype)
    off = (int4(weight) - weight.float()).abs().view(128, 16, 64)
    steps = weight.float().view(128, 16, 64).aminmax(dim=-1)
    assert bool((off.amax(-1) <= 0.105 * (steps.max - steps.min)).all())


@pytest.mark.usefixtures("kernels")
def test_sixteen_numbers_at_equal_distances_come_back_exactly() -> None:
    weight = (torch.arange(64) % 16 - 5).repeat(3, 2).float() * 0.25
    assert torch.equal(int4(weight), weight)


@pytest.mark.usefixtures("kernels")
def test_weights_of_one_sign_keep_zero_among_their_numbers() -> None:
    weight = weights.random(4, 128).abs() + 0.1
    weight[1] *= -1
    weight[:, ::8] = 0
    found = int4(weight)
    assert found[:, ::8].abs().max() < 0.01 * found.abs().max()  # aten rounds scale and zero, each by itself
    assert weights.relative(found, weight) < 0.1


@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight = weights.random(6, 128, dtype)
    weight[2] = 0
    weight[4, 64:] = 0
    found = int4(weight)
    assert not found[2].any()
    assert not found[4, 64:].any()
    assert not int4(torch.zeros(3, 64, dtype=dtype)).any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("largest", [3e38, 1e30, 1e-30])
def test_weights_of_any_size_are_kept_to_within_a_code(largest: float) -> None:
    weight = weights.random(8, 128)
    weight = weight / weight.abs().max() * largest
    found = int4(weight)
    assert torch.isfinite(found).all()
    assert weights.relative(found, weight) < 0.15


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.usefixtures("kernels")
def test_what_is_no_number_spoils_its_block_only_and_is_seen_there(bad: float) -> None:
    weight = weights.random(6, 192)
    sound = int4(weight)
    weight[2, 70] = bad
    made = weights.quantized("int4", weight)
    assert not all(torch.isfinite(tensor).all() for tensor in made.tensors().values() if tensor.is_floating_point())
    found = weights.whole(made)
    assert found[2, 64:128].isfinite().logical_not().any()
    found[2, 64:128] = sound[2, 64:128] = 0
    torch.testing.assert_close(found, sound, rtol=2e-3, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_byte(threads: int) -> None:
    weight = weights.random(200, 640, torch.bfloat16)
    wanted = int4(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(int4(weight), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kernels")
def test_rows_that_come_in_any_order_make_the_same_weight() -> None:
    from loadstone.quantization import find_strategy

    weight = weights.random(100, 192, torch.bfloat16)
    packing = find_strategy("int4").packing(
        "linear", 100, 192, source=weight.dtype, device=weights.CPU, dtype=torch.float32
    )  # fmt: skip
    for start, stop in ((70, 100), (0, 33), (33, 70)):
        packing.add(start, weight[start:stop])
    assert torch.equal(weights.whole(packing.finish()), int4(weight))


@pytest.mark.usefixtures("kernels")
def test_columns_that_are_no_whole_blocks_are_kept_in_8_bits() -> None:
    weight = weights.random(30, 100)
    assert torch.equal(int4(weight), weights.whole(weights.quantized("8bit", weight)))
