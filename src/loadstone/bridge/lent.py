"""Weights of a loaded model as tensors for other libraries: numbers to look at, and no memory of their own.

Products and look-ups go to the weight as it is kept. Whatever else is done with a lent tensor sees its numbers, which
are made for that moment. It cannot be changed, and when the model is unloaded nothing of it stays. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import torch
from torch.utils._pytree import tree_map_only

from loadstone.errors import ConfigurationError, ModelNotLoadedError
from loadstone.quantization.linear import Linear

functional = torch.nn.functional
aten = torch.ops.aten

_AGAIN = (aten.detach.default, aten.alias.default)  # what gives the same numbers in the same memory


class Loan:
    """What a loaded model lends, until it `end`s: weights by name, in the compute type.

    `used` is called with the number of tokens of each look-up.
    """

    def __init__(
        self, weights: Mapping[str, Linear | torch.Tensor], dtype: torch.dtype, device: torch.device,
        used: Callable[[int], object],
    ) -> None:  # fmt: skip
        self._weights, self._used = dict(weights), used
        self._names = tuple(weights)
        self.dtype, self.device = dtype, device

    def lend(self) -> dict[str, Lent]:
        """Return all weights as tensors."""
        return {name: Lent(self, name) for name in self._names}

    def end(self) -> None:
        """Hold nothing any more; what was lent raises ModelNotLoadedError from now on."""
        self._weights, self._used = {}, lambda count: None

    def of(self, name: str) -> Linear | torch.Tensor:
        """Return a weight as it is kept; raise ModelNotLoadedError once the loan has ended."""
        found = self._weights.get(name)
        if found is None:
            raise ModelNotLoadedError(
                "The model was unloaded, and this transformers model with it.",
                hint="Call load_base_model() again, and use what it returns.",
            )
        return found

    def weights(self) -> dict[str, Linear | torch.Tensor]:
        """Return all weights as they are kept, by name."""
        return {name: self.of(name) for name in self._names}

    def matrix(self, name: str) -> Linear:
        """Return a weight that is a matrix."""
        found = self.of(name)
        assert isinstance(found, Linear)
        return found

    def note(self, count: int) -> None:
        """Take note that so many tokens were looked up."""
        self._used(count)


class Lent(torch.Tensor):
    """A weight of a loaded model: a matrix rows × columns, or a vector."""

    loan: Loan
    weight_name: str

    @staticmethod
    def __new__(cls, loan: Loan, name: str) -> Lent:
        kept = loan.of(name)
        shape = (kept.rows, kept.columns) if isinstance(kept, Linear) else kept.shape
        made: Lent = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=loan.dtype, device=loan.device)
        made.loan, made.weight_name = loan, name
        return made

    def __init__(self, loan: Loan, name: str) -> None:
        super().__init__()

    @property
    def kept(self) -> Linear | torch.Tensor:
        """The weight as it is kept."""
        return self.loan.of(self.weight_name)

    def numbers(self) -> torch.Tensor:
        """Return the weight's numbers, in memory of their own."""
        kept = self.kept
        return kept.dequantize(0, kept.rows, self.dtype) if isinstance(kept, Linear) else kept.to(self.dtype, copy=True)

    # -- what torch asks ------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        ours = _OURS.get(func)
        if ours is not None:
            return ours(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _AGAIN:
            return Lent(args[0].loan, args[0].weight_name)
        given = {**dict(zip((one.name for one in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        for said in func._schema.arguments:
            is_written = said.alias_info is not None and said.alias_info.is_write
            if is_written and isinstance(given.get(said.name), Lent):
                _refuse("be changed")
        plain, named = tree_map_only(Lent, Lent.numbers, (list(args), dict(kwargs or {})))
        return func(*plain, **named)

    # -- what must not happen to it -------------------------------------------------------------------------------

    @property
    def data(self) -> Self:
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not (isinstance(value, Lent) and value.loan is self.loan and value.weight_name == self.weight_name):
            _refuse("be replaced")

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            _refuse("be trained")
        return self

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        _refuse("be changed")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it never changes

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("be pickled")

    def data_ptr(self) -> NoReturn:
        _refuse("be read where it is")  # who reads memory by address would read at 0

    def storage(self) -> NoReturn:
        _refuse("be read where it is")

    # -- what torch does not ask ----------------------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> Any:
        return self.numbers().numpy(force=force)

    def __array__(self, *arguments: Any, **settings: Any) -> Any:
        return self.numbers().__array__(*arguments, **settings)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        return self.numbers().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kept = self.loan._weights.get(self.weight_name)
        form = "given back" if kept is None else type(kept).__name__
        return f"Lent({self.weight_name}: {form}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _refuse(what: str) -> NoReturn:
    raise ConfigurationError(
        f"A weight of a loaded model cannot {what}: it is kept quantised, and shared with manager.generate().",
        hint="Train an adapter (PEFT's LoRA) on top of it. To merge one, or to go on with other weights, "
        "save_pretrained(FOLDER) and load that folder with transformers.",
    )


# -- products and look-ups ----------------------------------------------------------------------------------------


def _linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x·Wᵀ + bias for x of … × columns, as `torch.nn.functional.linear` does."""
    if not isinstance(weight, Lent) or isinstance(x, Lent):
        x, weight, bias = tree_map_only(Lent, Lent.numbers, (x, weight, bias))
        return functional.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[-1] or x.device != weight.device:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device}; a weight of {tuple(weight.shape)} on {weight.device} is multiplied "
            f"with … × {weight.shape[-1]} there"
        )
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: torch.Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return _product(x, weight, bias)


def _product(x: torch.Tensor, weight: Lent, bias: torch.Tensor | None = None) -> torch.Tensor:
    kept, dtype = weight.loan.matrix(weight.weight_name), weight.dtype
    if isinstance(bias, Lent):
        bias = bias.kept  # type: ignore[assignment]
    flat = x.detach().reshape(-1, kept.columns).to(dtype)
    y = kept(flat, bias=None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], kept.rows).to(x.dtype)


class _Product(torch.autograd.Function):
    """x·Wᵀ that x can learn through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Lent) -> torch.Tensor:
        ctx.weight = weight  # not as it is kept: who keeps a graph keeps no memory of a model
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, *changes: torch.Tensor) -> tuple[torch.Tensor, None]:
        (change,) = changes
        kept = ctx.weight.loan.matrix(ctx.weight.weight_name)
        flat = change.reshape(-1, kept.rows).to(ctx.weight.dtype)
        return kept.multiply_back(flat).view(*change.shape[:-1], kept.columns).to(change.dtype), None


def _embedding(
    ids: torch.Tensor, weight: Lent, padding_idx: int | None = None, max_norm: float | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """Return the rows that `ids` (of any shape) name, as `torch.nn.functional.embedding` does."""
    if max_norm is not None:
        _refuse("be renormed")
    rows = weight.loan.matrix(weight.weight_name).lookup(ids.reshape(-1))
    weight.loan.note(ids.numel())
    return rows.view(*ids.shape, rows.shape[-1])


_OURS: Mapping[Any, Callable[..., torch.Tensor]] = {functional.linear: _linear, functional.embedding: _embedding}
