"""A lent weight: numbers to whoever looks, our product to whoever multiplies, and nothing that can be changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loadstone import ConfigurationError, GenerationError, ModelNotLoadedError
from loadstone.bridge.lent import Lent, Loan
from loadstone.quantization import find_strategy

ROWS, COLUMNS = 48, 128
functional = torch.nn.functional


def _loan() -> tuple[Loan, torch.Tensor]:
    """Return a loan of a matrix of NF4 and a vector, and the numbers that the matrix stands for."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    kept = find_strategy("4bit").quantize(
        "linear", [torch.randn(ROWS, COLUMNS, generator=generator)], device, torch.float32
    )
    vector = torch.rand(ROWS, generator=generator)
    loan = Loan({"matrix": kept, "vector": vector}, torch.float32, device, lambda count: None)
    return loan, kept.dequantize(0, ROWS, torch.float32)


@pytest.fixture
def lent() -> dict[str, Lent]:
    return _loan()[0].lend()


@pytest.fixture
def numbers() -> torch.Tensor:
    return _loan()[1]


def test_who_reads_memory_by_address_is_refused(lent: dict[str, Lent], tmp_path: Path) -> None:
    """There is none: a library that reads it would read at address 0."""
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        save_file({"weight": lent["matrix"]}, tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    "look",
    [
        lambda weight: weight + 1,
        lambda weight: weight[3:7, ::2],
        lambda weight: weight.t() @ weight,
        lambda weight: torch.linalg.norm(weight),
        lambda weight: torch.cat([weight, weight]),
        lambda weight: weight.to(torch.bfloat16),
        lambda weight: weight.clone(),
        lambda weight: torch.from_numpy(weight.numpy()),
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: torch.nn.functional.linear(weight, torch.eye(COLUMNS)),
    ],
)
def test_whoever_looks_sees_its_numbers(
    lent: dict[str, Lent], numbers: torch.Tensor, look: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    found, wanted = look(lent["matrix"]), look(numbers)
    assert type(found) is torch.Tensor
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (2, 5, COLUMNS), (0, COLUMNS)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_its_product_is_that_of_its_numbers(
    lent: dict[str, Lent], numbers: torch.Tensor, shape: tuple[int, ...], with_bias: bool
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    bias = lent["vector"] if with_bias else None
    found = functional.linear(x, lent["matrix"], bias)
    wanted = functional.linear(x, numbers, None if bias is None else bias.numbers())
    assert found.shape == wanted.shape
    assert (found - wanted).abs().sum() <= 1e-3 * wanted.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_of_the_type_of_x(lent: dict[str, Lent], dtype: torch.dtype) -> None:
    found = functional.linear(torch.ones(2, COLUMNS, dtype=dtype), lent["matrix"])
    assert found.dtype == dtype


def test_x_learns_through_it_as_through_its_numbers(lent: dict[str, Lent], numbers: torch.Tensor) -> None:
    changes = []
    for weight in (lent["matrix"], numbers):
        x = torch.randn(2, 5, COLUMNS, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = functional.linear(x, weight, lent["vector"].numbers())
        (y * torch.arange(ROWS)).sum().backward()
        assert x.grad is not None
        changes.append(x.grad)
    torch.testing.assert_close(*changes)


def test_a_look_up_is_of_its_rows(lent: dict[str, Lent], numbers: torch.Tensor) -> None:
    ids = torch.tensor([[3, 3, 47], [0, 1, 2]])
    assert torch.equal(functional.embedding(ids, lent["matrix"]), functional.embedding(ids, numbers))


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, COLUMNS + 64), torch.ones(2, COLUMNS - 1), torch.ones(2, COLUMNS, device="meta")]
)
def test_what_cannot_be_multiplied_is_refused(lent: dict[str, Lent], wrong: torch.Tensor) -> None:
    """The kernels do not look: what is refused here would read beyond its memory."""
    with pytest.raises(ValueError, match="multiplied"):
        functional.linear(wrong, lent["matrix"])


def _set_gradient(weight: torch.Tensor) -> None:
    weight.requires_grad = True


def _set_data(weight: torch.Tensor) -> None:
    weight.data = torch.zeros(ROWS, COLUMNS)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight.copy_(torch.zeros(ROWS, COLUMNS)),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: torch.add(weight, 1, out=weight),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.requires_grad_(),
        lambda weight: functional.embedding(torch.tensor([1]), weight, max_norm=1.0),
        lambda weight: pickle.dumps(weight),
        _set_gradient,
        _set_data,
    ],
)
def test_it_cannot_be_changed(
    lent: dict[str, Lent], numbers: torch.Tensor, change: Callable[[torch.Tensor], object]
) -> None:
    with pytest.raises(ConfigurationError, match="save_pretrained"):
        change(lent["matrix"])
    assert torch.equal(lent["matrix"] + 0, numbers)


def test_a_vectors_numbers_are_a_copy(lent: dict[str, Lent]) -> None:
    """Or who changes what it was given would change the decoder."""
    (lent["vector"].view(-1)).mul_(2)
    assert torch.equal(lent["vector"] + 0, _loan()[0].lend()["vector"] + 0)


def test_a_parameter_of_it_is_one(lent: dict[str, Lent]) -> None:
    parameter = torch.nn.Parameter(lent["matrix"], requires_grad=False)
    assert isinstance(parameter, torch.nn.Parameter)
    assert isinstance(parameter, Lent)
    assert copy.deepcopy(parameter) is parameter


def test_modules_that_have_it_stay_where_they_are(lent: dict[str, Lent], numbers: torch.Tensor) -> None:
    """What changes neither type nor device is no change; what would is refused."""
    module = torch.nn.Linear(COLUMNS, ROWS, bias=False, device="meta")
    module.weight = torch.nn.Parameter(lent["matrix"], requires_grad=False)
    assert torch.equal(module.to("cpu").float().requires_grad_(False).weight + 0, numbers)
    with pytest.raises(ConfigurationError, match="replaced"):
        module.half()


def test_it_says_what_it_is(lent: dict[str, Lent]) -> None:
    assert "matrix" in repr(lent["matrix"])
    assert "Nf4" in repr(lent["matrix"])


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: functional.linear(torch.ones(COLUMNS), weight),
        lambda weight: functional.embedding(torch.tensor([1]), weight),
        lambda weight: weight.numpy(),
    ],
)
def test_after_the_loan_its_use_is_an_error(use: Callable[[Any], object]) -> None:
    loan, _ = _loan()
    weight = loan.lend()["matrix"]
    loan.end()
    with pytest.raises(ModelNotLoadedError, match="load_base_model"):
        use(weight)
    assert "given back" in repr(weight)


def test_a_graph_keeps_no_memory_of_a_model() -> None:
    """Who goes back through a product after the loan has ended is told so."""
    loan, _ = _loan()
    x = torch.ones(COLUMNS, requires_grad=True)
    y = functional.linear(x, loan.lend()["matrix"]).sum()
    loan.end()
    with pytest.raises(GenerationError, match="unloaded"):
        y.backward()
