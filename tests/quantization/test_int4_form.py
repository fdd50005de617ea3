"""Codes, scales and zero points that others made are kept as they came, and multiplied so, on each way there is."""

from __future__ import annotations

import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.quantization import aten_int4
from loadstone.quantization.aten_int4 import AtenInt4Linear, unpacked
from loadstone.quantization.int4_linear import (
    Int4Linear,
    Int4Packing,
    ReorderedLinear,
    TurnedInt4Linear,
    restore_int4,
)
from loadstone.quantization.linear import Linear
from loadstone.telemetry import Event

again = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GROUPS = (32, 64, 128, None)  # None is a whole row
SCALE_TYPES = (torch.float16, torch.bfloat16)


class Given:
    """A weight as a checkpoint has it, and the numbers that it means."""

    def __init__(
        self, rows: int, columns: int, group: int | None, seed: int = 0, dtype: torch.dtype = torch.float16
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.columns, self.group = rows, columns, group or columns
        groups = columns // self.group
        self.numbers = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
        self.codes = self.numbers[:, 0::2] << 4 | self.numbers[:, 1::2]
        self.scales = torch.rand(rows, groups, generator=generator).mul_(0.02).add_(1e-5).to(dtype)
        self.zeros = torch.randint(0, 16 * 16 + 1, (rows, groups), generator=generator) / 16

    @property
    def whole(self) -> torch.Tensor:
        off = self.numbers.view(self.rows, -1, self.group) - self.zeros.unsqueeze(-1)
        return (off * self.scales.float().unsqueeze(-1)).view(self.rows, self.columns)

    def kept(self, *, first: int = 0, dtype: torch.dtype = torch.float32) -> Linear:
        """Return the weight as it is kept; rows from `first` on come before the others."""
        packing = Int4Packing(self.rows, self.columns, self.group, weights.CPU, dtype)
        for start, stop in ((first, self.rows), (0, first)):
            packing.add(start, self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop])
        return packing.finish()


def is_kept(one: Given, kept: Linear) -> bool:
    """Tell whether the numbers of a weight are those that were given; aten has scales in bfloat16."""
    if not isinstance(kept, AtenInt4Linear):
        return torch.equal(weights.whole(kept), one.whole)
    has_codes = torch.equal(unpacked(kept.packed, one.columns, 0, one.rows), one.numbers)
    return has_codes and weights.relative(weights.whole(kept), one.whole) < 5e-3


def close(kept: Linear) -> float:
    """Return the error that a product may have, relative to what is usual."""
    return 6e-3 if isinstance(kept, AtenInt4Linear) else 2e-4


def inputs(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("kernels")
@given(
    rows=st.integers(1, 70), blocks=st.integers(1, 4), group=st.sampled_from(GROUPS), seed=st.integers(0, 99),
    dtype=st.sampled_from(SCALE_TYPES), first=st.integers(0, 69),
)  # fmt: skip
@again
def test_what_is_kept_is_scale_times_code_less_zero_point(
    rows: int, blocks: int, group: int | None, seed: int, dtype: torch.dtype, first: int
) -> None:
    one = Given(rows, 128 * blocks, group, seed, dtype)
    assert is_kept(one, one.kept(first=min(first, rows)))


@pytest.mark.usefixtures("kernels")
@given(
    rows=st.integers(1, 150), blocks=st.integers(1, 5), group=st.sampled_from(GROUPS),
    count=st.sampled_from((1, 2, 4, 7, 8, 9, 15, 33)),
)  # fmt: skip
@again
def test_a_product_is_that_of_these_numbers(rows: int, blocks: int, group: int | None, count: int) -> None:
    one, x = Given(rows, 128 * blocks, group), inputs(count, 128 * blocks)
    kept, usual = one.kept(), x.norm() * one.whole.norm() / x.shape[-1] ** 0.5
    assert float((kept(x) - x @ weights.whole(kept).T).norm() / usual) < close(kept)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("dtype", SCALE_TYPES, ids=str)
def test_codes_scales_and_zero_points_are_bit_for_bit_as_given(
    group: int | None, dtype: torch.dtype, kernels: str
) -> None:
    one = Given(37, 256, group, dtype=dtype)
    kept = one.kept()
    if kernels == "torch":
        pytest.skip("aten has scales in its own type")
    assert isinstance(kept, TurnedInt4Linear if kept.kernels and kept.kernels.is_wide else Int4Linear)
    assert torch.equal(kept.codes, one.codes)
    assert torch.equal(kept.scales, one.scales.float())
    assert torch.equal(kept.zeros, one.zeros)


@pytest.mark.parametrize("largest", [3e4, 1.0, 1e-7])
def test_scales_of_any_size_are_as_given(largest: float) -> None:
    one = Given(8, 128, 64)
    one.scales = (one.scales.float() / one.scales.float().max() * largest).half()
    assert is_kept(one, one.kept())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("group", GROUPS)
def test_what_its_tensors_and_facts_make_is_the_same_weight(group: int | None) -> None:
    """As the store keeps it and gives it back."""
    made, x = Given(37, 256, group).kept(), inputs(3, 256)
    restored = restore_int4(made.tensors(), made.facts, torch.float32)
    assert type(restored) is type(made)
    assert torch.equal(restored(x), made(x))
    assert torch.equal(weights.whole(restored), weights.whole(made))


@pytest.mark.usefixtures("kernels")
def test_columns_that_were_sorted_meet_their_own_activations() -> None:
    """As GPTQ's with act-order: groups are of columns that do not stand side by side."""
    within, x = Given(40, 256, 64).kept(), inputs(5, 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(2))
    numbers = torch.empty(40, 256)
    numbers[:, order] = weights.whole(within)
    made = ReorderedLinear(within, order)
    assert torch.equal(weights.whole(made), numbers)
    assert weights.relative(made(x), x @ numbers.T) < close(within)
    norm = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.5
    wanted = torch.nn.functional.rms_norm(x, (256,), norm, 1e-5) @ numbers.T
    assert weights.relative(made(x, norm=norm, epsilon=1e-5), wanted) < close(within)
    restored = restore_int4(made.tensors(), made.facts, torch.float32)
    assert isinstance(restored, ReorderedLinear)
    assert torch.equal(restored(x), made(x))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("columns", "group"), [(50, 10), (6, 6), (80, 16)])
def test_groups_that_nobody_has_a_product_for_are_dequantised(columns: int, group: int) -> None:
    one, x = Given(20, columns, group), inputs(3, columns)
    kept = one.kept()
    assert isinstance(kept, Int4Linear)
    assert torch.equal(weights.whole(kept), one.whole)
    assert weights.relative(kept(x), x @ one.whole.T) < 1e-6


@pytest.mark.parametrize(("columns", "group"), [(100, 64), (63, 21), (64, 128)])
def test_columns_that_are_no_whole_groups_are_refused(columns: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"{columns} columns"):
        Int4Packing(8, columns, group, weights.CPU, torch.float32)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("rows", [1, 16, 40, 64, 300])
def test_large_weights_are_packed_for_aten_a_strip_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Given(rows, 128, 64)
    monkeypatch.setattr(aten_int4, "STRIP", 1)
    kept = one.kept()
    assert isinstance(kept, AtenInt4Linear)
    assert is_kept(one, kept)
    whole = weights.whole(kept)
    for start, stop in ((rows // 2, rows), (0, rows // 3), (rows // 3, rows // 2 + 1)):
        assert torch.equal(kept.dequantize(start, stop, torch.float32), whole[start:stop])


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("count", [aten_int4.FEW, aten_int4.FEW + 1])
def test_few_rows_of_x_go_to_aten_and_many_meet_dequantised_rows(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked = Given(40, 128, 64).kept(), []
    assert isinstance(kept, AtenInt4Linear)
    product = kept._product
    monkeypatch.setattr(kept, "_product", lambda x: asked.append(len(x)) or product(x))
    x = inputs(count, 128)
    assert weights.relative(kept(x), x @ weights.whole(kept).T) < close(kept)
    assert asked == ([count] if count <= aten_int4.FEW else [])


@pytest.mark.usefixtures("no_kernels")
def test_where_only_aten_knows_the_packing_products_tell_the_numbers() -> None:
    """As on an NVIDIA GPU."""
    kept = Given(40, 320, 64).kept()
    assert isinstance(kept, AtenInt4Linear)
    assert weights.relative(kept._columns(3, 29, torch.float32), weights.whole(kept)[3:29]) < 3e-3


@pytest.mark.usefixtures("no_kernels")
def test_where_atens_product_is_wrong_weights_are_dequantised(
    monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    monkeypatch.setattr(aten_int4, "_found", {})
    monkeypatch.setattr(AtenInt4Linear, "_product", lambda self, x: x.new_zeros(len(x), 80))
    one, x = Given(40, 128, 64), inputs(2, 128)
    kept = one.kept()
    assert isinstance(kept, Int4Linear)
    assert weights.relative(kept(x), x @ one.whole.T) < 1e-6
    (event,) = [event for event in events if event.name == "int4.warning"]
    assert "disagrees" in str(event.fields["reason"])
