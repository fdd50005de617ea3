"""What a strategy says a weight will take is what it takes."""

from __future__ import annotations

import pytest
import torch
import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadstone.errors import ConfigurationError
from loadstone.quantization import find_strategy, known_strategies
from loadstone.quantization.linear import Linear

columns_of = st.integers(1, 6).map(lambda count: 64 * count) | st.integers(1, 300)


def kept(linear: Linear) -> int:
    """Return the bytes of the memory behind a weight's tensors, also where a tensor is a part of it."""
    memory = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in linear.tensors().values()}
    return sum(memory.values())


@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
@pytest.mark.parametrize("part", ["linear", "embedding", "lm_head"])
@pytest.mark.usefixtures("kernels")
@given(rows=st.integers(1, 90), columns=columns_of, dtype=st.sampled_from(weights.DTYPES))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weight_bytes_are_those_of_the_tensors(
    strategy: str, part: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    made = weights.quantized(strategy, torch.ones(rows, columns, dtype=dtype), part=part)
    said = find_strategy(strategy).weight_bytes(part, rows, columns, dtype_bytes=dtype.itemsize)
    assert made.nbytes == kept(made)
    # Rows that are multiplied may stand in sixteens, and the last of these may have a few too many.
    few = 15 * columns if strategy != "none" and part != "embedding" and rows % 16 else 0
    assert made.nbytes <= said <= made.nbytes + few


@pytest.mark.parametrize("strategy", ["none", "8bit", "4bit", "int4"])
def test_stacked_weights_take_the_sum_of_each(strategy: str) -> None:
    sizes = (48, 16, 32)
    made = weights.quantized(strategy, *(weights.random(rows, 192) for rows in sizes))
    found = find_strategy(strategy)
    assert made.nbytes == sum(found.weight_bytes("linear", rows, 192, dtype_bytes=4) for rows in sizes)


def test_4bit_takes_a_quarter_of_16_bits_and_a_little() -> None:
    quarter = find_strategy("4bit").weight_bytes("linear", 4096, 4096)
    assert quarter / (2 * 4096 * 4096) == pytest.approx(0.2656, abs=1e-4)


@pytest.mark.parametrize(("alias", "name"), [("nf4", "4bit"), ("int8", "8bit"), ("bf16", "none")])
def test_other_names_mean_the_same_strategy(alias: str, name: str) -> None:
    assert find_strategy(alias) is find_strategy(name)


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'3bit' is not known\n.*Known are none, 8bit, 4bit, int4"):
        find_strategy("3bit")
    assert known_strategies()[:4] == ("none", "8bit", "4bit", "int4")
