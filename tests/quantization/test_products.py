"""Every form of a weight multiplies as its dequantised numbers do, with each of our kernels and without."""

from __future__ import annotations

import mmap
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.quantization.aten_int4 import AtenInt4Linear
from loadstone.quantization.linear import Linear

CLOSE = 2e-4  # length of the error, relative to the result's
COUNTS = (1, 2, 3, 4, 5, 7, 8, 15, 33)
again = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bitsandbytes_form(*parts: torch.Tensor) -> Linear:
    from loadstone.quantization._bitsandbytes import BitsandbytesNf4

    return BitsandbytesNf4.quantize(torch.cat(parts))


FORMS: dict[str, Callable[[torch.Tensor], Linear]] = {
    "float32": lambda weight: weights.quantized("none", weight),
    "bfloat16": lambda weight: weights.quantized("none", weight.bfloat16()),
    "float16": lambda weight: weights.quantized("none", weight.half()),
    "int8": lambda weight: weights.quantized("8bit", weight),
    "nf4": lambda weight: weights.quantized("4bit", weight),
    "int4": lambda weight: weights.quantized("int4", weight),
    "bitsandbytes": bitsandbytes_form,
}
blocks = st.integers(1, 6).map(lambda count: 64 * count)
odd = st.integers(1, 300)
every_form = pytest.mark.parametrize("form", FORMS)


def close(linear: Linear) -> float:
    """Return the error that a product may have: aten's of integers is of bfloat16."""
    return 6e-3 if isinstance(linear, AtenInt4Linear) else CLOSE


def off(found: torch.Tensor, wanted: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the error relative to what sums of such numbers are like; that one happens to cancel says nothing."""
    usual = x.double().norm() * weight.double().norm() / x.shape[-1] ** 0.5
    return float((found.double() - wanted.double()).norm() / usual)


def inputs(count: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


@every_form
@pytest.mark.usefixtures("kernels")
@given(count=st.sampled_from(COUNTS), rows=st.integers(1, 150), columns=blocks, seed=st.integers(0, 9))
@again
def test_a_product_is_that_of_the_dequantised_weight(form: str, count: int, rows: int, columns: int, seed: int) -> None:
    linear, x = FORMS[form](weights.random(rows, columns, seed=seed)), inputs(count, columns, seed)
    assert (linear.rows, linear.columns) == (rows, columns)
    found = linear(x)
    assert found.shape == (count, rows)
    w = weights.whole(linear)
    assert off(found, x @ w.T, x, w) < close(linear)


@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.usefixtures("kernels")
@given(count=st.sampled_from(COUNTS), rows=st.integers(1, 90), columns=odd)
@again
def test_rows_need_not_be_whole_blocks(strategy: str, count: int, rows: int, columns: int) -> None:
    linear, x = weights.quantized(strategy, weights.random(rows, columns)), inputs(count, columns)
    w = weights.whole(linear)
    assert off(linear(x), x @ w.T, x, w) < close(linear)


@every_form
@pytest.mark.usefixtures("kernels")
@given(
    count=st.sampled_from(COUNTS), rows=st.integers(32, 120), columns=blocks,
    before=st.sampled_from(["", "norm", "gate"]), has_bias=st.booleans(), has_residual=st.booleans(),
)  # fmt: skip
@again
def test_norm_gate_bias_and_residual_are_those_of_torch(
    form: str, count: int, rows: int, columns: int, before: str, has_bias: bool, has_residual: bool
) -> None:
    linear = FORMS[form](weights.random(rows, columns))
    x = inputs(count, 2 * columns if before == "gate" else columns) * 3
    norm = torch.rand(columns, generator=torch.Generator().manual_seed(2)) + 0.5 if before == "norm" else None
    bias = inputs(1, rows, 3)[0] if has_bias else None
    residual = inputs(count, rows, 4) if has_residual else None
    wanted = x
    if norm is not None:
        wanted = torch.nn.functional.rms_norm(x, (columns,), norm, 1e-5)
    elif before == "gate":
        wanted = torch.nn.functional.silu(x[:, :columns]) * x[:, columns:]
    seen, w = wanted, weights.whole(linear)
    wanted = seen @ w.T
    wanted = wanted + (0 if bias is None else bias) + (0 if residual is None else residual)
    given_residual = None if residual is None else residual.clone()
    given_bias, given_x = None if bias is None else bias.clone(), x.clone()
    found = linear(x, norm=norm, epsilon=1e-5, gated=before == "gate", bias=bias, residual=residual)
    assert off(found, wanted, seen, w) < close(linear)
    assert torch.equal(x, given_x)
    assert residual is None or (given_residual is not None and torch.equal(residual, given_residual))
    assert bias is None or (given_bias is not None and torch.equal(bias, given_bias))


@every_form
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 7, 8, 15, 33])
def test_matrices_larger_than_a_tile_and_a_panel_have_no_seams(form: str, count: int) -> None:
    linear, x = FORMS[form](weights.random(300, 1088)), inputs(count, 1088)
    w = weights.whole(linear)
    found, wanted = linear(x), x @ w.T
    assert off(found, wanted, x, w) < close(linear)
    usual = x.norm(dim=-1, keepdim=True) * w.norm(dim=-1) / 1088**0.5
    assert ((found - wanted).abs() < 5 * close(linear) * usual).all()


@pytest.mark.parametrize("strategy", ["8bit", "4bit", "int4"])
def test_a_row_gives_the_same_numbers_alone_and_in_company(strategy: str, kernels: str) -> None:
    """What a model answers does not depend on who else asks, nor on how its prompt was cut."""
    if kernels == "torch":
        pytest.skip("torch promises no such thing")
    linear, x = weights.quantized(strategy, weights.random(150, 640)), inputs(47, 640)
    x[5, 100], x[9] = 1000.0, 0.0
    together = linear(x)
    for count in COUNTS:
        for start in (0, 3, 14):
            assert torch.equal(linear(x[start : start + count]), together[start : start + count])


@every_form
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_as_large_as_they_can_be_do_not_overflow(form: str, count: int, sign: float) -> None:
    linear, x = FORMS[form](torch.full((40, 128), sign)), torch.full((count, 128), 3.0)
    x[:, 64:] *= -1.001
    wanted = x @ weights.whole(linear).T
    assert (linear(x) - wanted).abs().max() < close(linear) * 3 * 64


@every_form
@pytest.mark.usefixtures("kernels")
def test_a_small_epsilon_and_small_numbers_are_normed_well(form: str) -> None:
    linear, x = FORMS[form](weights.random(64, 128)), inputs(3, 128) * 1e-3
    norm = torch.ones(128)
    for epsilon in (1e-6, 1e-5):
        wanted = torch.nn.functional.rms_norm(x, (128,), norm, epsilon) @ weights.whole(linear).T
        assert weights.relative(linear(x, norm=norm, epsilon=epsilon), wanted) < close(linear)


@every_form
@pytest.mark.usefixtures("kernels")
def test_a_gate_far_from_zero_does_not_overflow(form: str) -> None:
    linear = FORMS[form](weights.random(64, 64))
    x = torch.cat([torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4]).repeat(8), torch.ones(64)])[None]
    wanted = (torch.nn.functional.silu(x[:, :64]) * x[:, 64:]) @ weights.whole(linear).T
    assert weights.relative(linear(x, gated=True), wanted) < close(linear)


@every_form
@pytest.mark.usefixtures("kernels")
def test_zeros_give_zeros(form: str) -> None:
    linear = FORMS[form](torch.zeros(40, 128))
    assert not linear(inputs(3, 128)).any()
    linear = FORMS[form](weights.random(40, 128))
    x = inputs(3, 128)
    x[1] = 0
    found = linear(x)
    assert not found[1].any()
    assert found[0].all()


@every_form
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("of_x", "of_w"), [(1e15, 1.0), (1e-15, 1.0), (1.0, 1e3), (1.0, 1e-3)])
def test_numbers_may_be_large_or_small(form: str, of_x: float, of_w: float) -> None:
    linear, x = FORMS[form](weights.random(40, 128) * of_w), inputs(4, 128) * of_x
    found = linear(x)
    assert torch.isfinite(found).all()
    assert weights.relative(found, x @ weights.whole(linear).T) < close(linear)


@every_form
@pytest.mark.usefixtures("kernels")
def test_one_activation_far_out_costs_the_other_blocks_nothing(form: str) -> None:
    """Activations of real models have a few values a thousand times as large as the rest."""
    linear, x = FORMS[form](weights.random(64, 256)), inputs(1, 256)
    x[0, 70] = 1000.0
    wanted = x @ weights.whole(linear).T
    assert weights.relative(linear(x), wanted) < close(linear)


@every_form
@pytest.mark.usefixtures("kernels")
def test_nan_in_one_row_of_x_stays_there(form: str) -> None:
    linear, x = FORMS[form](weights.random(40, 128)), inputs(4, 128)
    wanted = linear(x)
    x[2, 100] = float("nan")
    found = linear(x)
    assert found[2].isnan().all()
    rest = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found[rest], wanted[rest])


@every_form
@pytest.mark.usefixtures("kernels")
def test_x_need_not_lie_in_order(form: str) -> None:
    linear = FORMS[form](weights.random(40, 128))
    x = inputs(5, 256)[:, 64:192]
    assert not x.is_contiguous()
    assert weights.relative(linear(x), linear(x.contiguous())) < 1e-6
    turned = inputs(128, 5).T
    assert weights.relative(linear(turned), linear(turned.contiguous())) < 1e-6


@every_form
@pytest.mark.usefixtures("kernels")
def test_the_same_product_gives_the_same_bytes_each_time(form: str) -> None:
    weight, x = weights.random(150, 320), inputs(5, 320)
    first = FORMS[form](weight)
    second = FORMS[form](weight.clone())
    assert torch.equal(first(x), first(x.clone()))
    assert torch.equal(first(x), second(x))


@every_form
@pytest.mark.parametrize("count", [6, 9])
def test_threads_share_the_rows_without_gaps(form: str, count: int) -> None:
    linear, x = FORMS[form](weights.random(101, 128)), inputs(count, 128)
    wanted = linear(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert weights.relative(linear(x), wanted) < 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_device_that_computes_in_16_bits_gets_16_bits_back(strategy: str, dtype: torch.dtype) -> None:
    linear = weights.quantized(strategy, weights.random(80, 128), dtype=dtype)
    x = inputs(5, 128).to(dtype)
    found = linear(x, bias=torch.ones(80, dtype=dtype), residual=torch.ones(5, 80, dtype=dtype))
    assert found.dtype == dtype
    assert weights.relative(found, x.float() @ weights.whole(linear).T + 2) < 2e-2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
def test_an_embedding_is_looked_up_as_its_dequantised_rows(strategy: str, columns: int, dtype: torch.dtype) -> None:
    linear = weights.quantized(strategy, weights.random(50, columns), part="embedding", dtype=dtype)
    ids = torch.tensor([49, 0, 7, 7])
    found = linear.lookup(ids)
    assert found.dtype == dtype
    torch.testing.assert_close(found, linear.dequantize(0, 50, dtype)[ids])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("columns", [192, 100])
def test_stacked_weights_multiply_as_each_alone(strategy: str, columns: int) -> None:
    parts = [weights.random(rows, columns, seed=rows) for rows in (33, 16, 7)]
    x = inputs(3, columns)
    alone = torch.cat([weights.quantized(strategy, part)(x) for part in parts], -1)
    assert weights.relative(weights.quantized(strategy, *parts)(x), alone) < 1e-3


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("dtype", weights.DTYPES, ids=str)
def test_source_weights_are_never_written_to(strategy: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The source may be a read-only mapping of a file; what is kept must not be a view of it either."""
    source = weights.random(70, 192, dtype)
    before = source.clone()
    made = weights.quantized(strategy, source)
    made(inputs(3, 192))
    assert torch.equal(source, before)
    file = tmp_path / "weights"
    file.write_bytes(source.view(torch.uint8).numpy().tobytes())
    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says, once a process, that it must not be written to
        mapped = torch.frombuffer(mapping, dtype=dtype).view(70, 192)
    made = weights.quantized(strategy, mapped, mapped)
    made(inputs(3, 192))
    assert torch.equal(mapped, before)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in made.tensors().values()}
    assert mapped.untyped_storage().data_ptr() not in addresses


def test_a_weight_that_cannot_be_looked_up_says_so() -> None:
    with pytest.raises(NotImplementedError, match="BitsandbytesNf4"):
        bitsandbytes_form(weights.random(8, 64)).lookup(torch.tensor([0]))


def test_large_weights_are_dequantised_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels a product never holds the whole weight as floats."""
    from loadstone.quantization import linear as module

    monkeypatch.setattr(module, "kernels_for", lambda device, columns: None)
    monkeypatch.setattr(module, "TILE_NUMBERS", 10 * 128)
    made = weights.quantized("4bit", weights.random(101, 128))
    asked: list[int] = []
    dequantize = made.dequantize

    def watched(start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(stop - start)
        return dequantize(start, stop, dtype)

    monkeypatch.setattr(made, "dequantize", watched)
    x = inputs(3, 128)
    found = made(x)
    assert asked == [10] * 10 + [1]
    assert weights.relative(found, x @ dequantize(0, 101, torch.float32).T) < CLOSE


@pytest.mark.usefixtures("no_kernels")
def test_nf4_is_multiplied_without_kernels_and_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    form = weights.quantized("4bit", torch.randn(70, 128))
    wanted = form(torch.ones(2, 128))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    torch.testing.assert_close(form(torch.ones(2, 128)), wanted, rtol=1e-5, atol=1e-5)
