"""The formats of quantised checkpoints by name: methods as config.json calls them, layouts as `Coding` does.

A new format is a file beside this one, and a line in each of the two tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import TensorInfo
from loadstone.errors import CheckpointError

from .awq import Awq, AwqWords
from .base import Layout, Method, Module, Settings
from .bitsandbytes import Bitsandbytes, FourBits, Int8
from .compressed import Compressed, PackedWords, PlainInt8
from .fp8 import Fp8, Fp8Rows
from .gptq import Gptq, GptqWords

METHODS: Mapping[str, type[Method]] = {
    "bitsandbytes": Bitsandbytes,
    "awq": Awq,
    "gptq": Gptq,
    "compressed-tensors": Compressed,
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
}
LAYOUTS: Mapping[str, Layout] = {
    "bitsandbytes-nf4": FourBits(),
    "bitsandbytes-fp4": FourBits(),
    "bitsandbytes-int8": Int8(),
    "awq": AwqWords(),
    "gptq": GptqWords(1),
    "gptq-2": GptqWords(0),
    "compressed-packed": PackedWords(),
    "compressed-int8": PlainInt8(),
    "fp8": Fp8Rows(),
}


def method_of(config: Mapping[str, Any], file: Path) -> Method | None:
    """Return how a checkpoint was quantised, as its config.json says; None where it was not.

    Raises CheckpointError, naming the method and what is read, for one that is not read.
    """
    said = config.get("quantization_config")
    if not said:
        return None
    name = said.get("quant_method") if isinstance(said, dict) else None
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise CheckpointError(
            f"its weights are already quantised by {name!r}, which is not read; read are {', '.join(METHODS)}",
            file=file,
            hint="Use the original checkpoint and choose `quantization`: it is quantised while it loads.",
        )
    return method(Settings(said, file))


def join_weights(
    method: Method, found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """Return tensors with each quantised matrix of `expected` in place of the tensors that make it.

    What was not converted stays as it is. Raises CheckpointError where a matrix's tensors are not what they must be.
    """
    modules = {name.removesuffix(".weight"): shape for name, shape in expected.items() if len(shape) == 2}
    belonging: dict[str, dict[str, TensorInfo]] = {}
    others = {}
    for name, tensor in found.items():
        module = next((one for one in _prefixes(name) if one in modules), None)
        if module is None or tensor.coding is not None:  # a list in place of files has whole matrices already
            others[name] = tensor
        else:
            belonging.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    for module, tensors in belonging.items():
        weight = method.find(Module(module, modules[module], tensors))
        if weight is None:
            others.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
            continue
        others[weight.name] = weight
        if "bias" in tensors:
            others[f"{module}.bias"] = tensors["bias"]
    return others


def pieces_of(tensor: TensorInfo) -> Iterator[Piece]:
    """Yield the pieces of a quantised matrix."""
    return layout_of(tensor).pieces(tensor)


def layout_of(tensor: TensorInfo) -> Layout:
    """Return how the bytes of a quantised matrix lie."""
    assert tensor.coding is not None
    return LAYOUTS[tensor.coding.layout]


def _prefixes(name: str) -> Iterator[str]:
    """Yield the modules that a tensor of this name may belong to."""
    words = name.split(".")
    return (".".join(words[:count]) for count in range(1, len(words)))
