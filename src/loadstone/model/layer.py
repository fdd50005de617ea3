"""The weights of a decoder's layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loadstone.quantization.kernels.cpu import Call, Work
from loadstone.quantization.linear import KernelLinear, Linear


@dataclass
class Product:
    """A weight and its bias."""

    weight: Linear
    bias: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, *, norm: torch.Tensor | None = None, epsilon: float = 0.0, gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return f(x)·Wᵀ + bias + residual; see `Linear`."""
        return self.weight(x, norm=norm, epsilon=epsilon, gated=gated, bias=self.bias, residual=residual)

    def call(
        self, x: torch.Tensor, y: torch.Tensor, work: Work, *, norm: torch.Tensor | None = None, epsilon: float = 0.0,
        gated: bool = False, residual: torch.Tensor | None = None,
    ) -> Call:  # fmt: skip
        """Return the kernel's call that writes the same into y; only where the kernel `takes` so many rows."""
        assert isinstance(self.weight, KernelLinear)
        return self.weight.call(
            x, y, work, norm=norm, epsilon=epsilon, gated=gated, bias=self.bias, residual=residual
        )  # fmt: skip

    def takes(self, count: int) -> bool:
        """Tell whether there is a kernel for `count` rows of x."""
        return isinstance(self.weight, KernelLinear) and self.weight.takes(count)


@dataclass
class Layer:
    """The weights of one layer; q, k and v are one product, and so are gate and up."""

    attention_norm: torch.Tensor
    query_key_value: Product
    output: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    window: int | None = None

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """All products, in the order in which they are made."""
        return self.query_key_value, self.output, self.gate_up, self.down
