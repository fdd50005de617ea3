"""Writes small checkpoints that are quantised already, each by its format's own library or by its specification.

Of every matrix the reference is kept beside: its numbers as that library or specification works them out. Nothing here
is shared with what reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: which of eight rows a word has, from its lowest bits on
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Written:
    """The tensors of one matrix by what follows the module's name, and the numbers that they mean."""

    tensors: Tensors
    numbers: torch.Tensor


Writer = Callable[[torch.Tensor], Written]


@dataclass(frozen=True)
class Format:
    """A way to quantise: what config.json says of it, and what writes a matrix."""

    config: Mapping[str, Any]
    write: Writer


@dataclass
class Checkpoint:
    """A folder with a quantised checkpoint, and the numbers of its matrices by their names."""

    folder: Path
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], form: Format,
    *, left_out: tuple[str, ...] = (),
) -> Checkpoint:  # fmt: skip
    """Write a model with the matrices of its layers quantised, but for modules that end in one of `left_out`."""
    made = Checkpoint(folder)
    stored: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or ".layers." not in name or module.endswith(left_out or (" ",)):
            stored[name] = tensor
            continue
        written = form.write(tensor.float())
        stored |= {f"{module}.{suffix}": one.contiguous() for suffix, one in written.tensors.items()}
        made.numbers[name] = written.numbers
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in stored.items()}, folder / "model.safetensors")
    said = json.dumps({**config, "quantization_config": dict(form.config)})
    (folder / "config.json").write_text(said, encoding="utf-8")
    return made


def quantize_folder(
    source: Path, into: Path, form: Format, *, left_out: tuple[str, ...] = ()
) -> Checkpoint:  # fmt: skip
    """Write the plain checkpoint in `source` quantised, with all that stands beside its weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "model.safetensors")
    into.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        if into != source:
            shutil.copyfile(file, into / file.name)
    return write_checkpoint(into, config, tensors, form, left_out=left_out)


# -- bitsandbytes: by the library ---------------------------------------------------------------------------------


def nf4(*, block: int = 64, is_nested: bool = True, kind: str = "nf4") -> Format:
    """4 bits in blocks, their absmax doubly quantised or not."""

    def write(weight: torch.Tensor) -> Written:
        codes, state = bitsandbytes.quantize_4bit(
            weight, blocksize=block, compress_statistics=is_nested, quant_type=kind
        )  # fmt: skip
        beside = {f"weight.{name}": one for name, one in state.as_dict(packed=True).items()}
        return Written({"weight": codes, **beside}, bitsandbytes.dequantize_4bit(codes, state).float())

    return Format({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, write)


def int8() -> Format:
    """LLM.int8()."""

    def write(weight: torch.Tensor) -> Written:
        codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
        tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return Written(tensors, bitsandbytes.int8_vectorwise_dequant(codes, scales).float())

    return Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, write)


# -- AWQ and GPTQ: by what AutoAWQ and AutoGPTQ specify -----------------------------------------------------------


def rounded(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, *, is_symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (int64), scales (float16 numbers) and zeros (int64), the latter two rows × groups."""
    count, top = int(groups.max()) + 1, 2**bits - 1
    order = groups.argsort(stable=True)
    part = weight[:, order].view(len(weight), count, -1)
    low, high = part.amin(-1).clamp(max=0), part.amax(-1).clamp(min=0)
    if is_symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-6).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if is_symmetric else (-low / scales).round().clamp(1, top)
    found = ((part / scales[..., None]).round() + zeros[..., None]).clamp(0, top).long()
    codes = torch.empty(weight.shape, dtype=torch.int64)
    codes[:, order] = found.flatten(1)
    return codes, scales, zeros.long()


def meant(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return (code - zero) · scale."""
    return (codes - zeros[:, groups]).float() * scales[:, groups]


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Return rows × columns as AutoAWQ packs them: columns × rows/8, int32."""
    columns = codes.T
    words = torch.zeros(columns.shape[0], columns.shape[1] // 8, dtype=torch.int64)
    for place, row in enumerate(AWQ_ORDER):
        words |= columns[:, row::8] << 4 * place
    return as_int32(words)


def down_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows × columns as AutoGPTQ packs weights: columns · bits/32 × rows, int32."""
    columns, each = codes.T, 32 // bits
    words = torch.zeros(columns.shape[0] // each, columns.shape[1], dtype=torch.int64)
    for place in range(each):
        words |= columns[place::each] << bits * place
    return as_int32(words)


def across_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows × groups as AutoGPTQ packs zeros: groups × rows · bits/32, int32."""
    return down_words(codes.T, bits).T


def as_int32(words: torch.Tensor) -> torch.Tensor:
    """Return words of 32 bits, held in 64, as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(*, group: int = 128) -> Format:
    def write(weight: torch.Tensor) -> Written:
        groups = side_by_side(weight.shape[1], group)
        codes, scales, zeros = rounded(weight, groups, 4, is_symmetric=False)
        tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales.T.half()}
        return Written(tensors, meant(codes, scales, zeros, groups))

    return Format(
        {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, write
    )  # fmt: skip


def gptq(
    *, bits: int = 4, group: int = 128, is_symmetric: bool = True, act_order: bool = False, version: int = 1
) -> Format:
    """GPTQ's codes, whose rounding to the next is left out: how they are chosen is not how they are kept."""

    def write(weight: torch.Tensor) -> Written:
        groups = side_by_side(weight.shape[1], group)
        if act_order:
            groups = sorted_by_size(groups)
        codes, scales, zeros = rounded(weight, groups, bits, is_symmetric=is_symmetric)
        tensors = {
            "qweight": down_words(codes, bits), "qzeros": across_words(zeros - int(version == 1), bits),
            "scales": scales.T.half(), "g_idx": groups.int(),
        }  # fmt: skip
        return Written(tensors, meant(codes, scales, zeros, groups))

    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": is_symmetric, "desc_act": act_order}
    return Format({**said, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, write)


def sorted_by_size(groups: torch.Tensor) -> torch.Tensor:
    """Return the groups of columns that were sorted first; matrices that the same x is multiplied with sort alike."""
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(len(groups)))]


def side_by_side(columns: int, group: int) -> torch.Tensor:
    """Return the group of each column; a group of -1 is all of them."""
    return torch.arange(columns) // (columns if group == -1 else group)


# -- compressed-tensors: by the library ---------------------------------------------------------------------------


def compressed(
    *, bits: int = 4, group: int = 128, is_symmetric: bool = True, act_order: bool = False, packed: bool = True
) -> Format:
    """Whole numbers, packed in words or as int8; a group of -1 is one scale a row.

    The library no longer has act-order; what older files mean by it is worked out here.
    """
    scheme: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": is_symmetric}
    scheme |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    arguments, half = QuantizationArgs(**scheme), 2 ** (bits - 1)
    scheme |= {"actorder": "group"} if act_order else {}

    def write(weight: torch.Tensor) -> Written:
        groups = side_by_side(weight.shape[1], group)
        if act_order:
            groups = sorted_by_size(groups)
        codes, scales, zeros = rounded(weight, groups, bits, is_symmetric=is_symmetric)
        values, zero = (codes - half).to(torch.int8), (zeros - half).to(torch.int8)
        numbers = dequantize(values, scales, None if is_symmetric else zero, arguments)
        if act_order:
            numbers = meant(codes, scales, zeros, groups)
        tensors = {"weight_scale": scales}
        if packed:
            words = pack_to_int32(values, bits)
            assert torch.equal(unpack_from_int32(words, bits, values.shape), values)
            tensors |= {"weight_packed": words, "weight_shape": torch.tensor(values.shape)}
        else:
            tensors["weight"] = values
        if not is_symmetric:
            tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0) if packed else zero
        if act_order:
            tensors["weight_g_idx"] = groups.int()
        return Written(tensors, numbers.float())

    return Format(_compressed_config("pack-quantized" if packed else "int-quantized", scheme), write)


def _compressed_config(form: str, scheme: Mapping[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(scheme), "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"],
    }  # fmt: skip


# -- FP8: by what the methods specify -----------------------------------------------------------------------------


def fp8(*, block: tuple[int, int] | None = None, by_row: bool = False, method: str = "fp8") -> Format:
    """E4M3 with one scale a block, a row or in all."""
    name = "weight_scale_inv" if block else "weight_scale"

    def write(weight: torch.Tensor) -> Written:
        rows, columns = weight.shape
        height, width = block or ((1, columns) if by_row else (rows, columns))
        scales = torch.stack([
            torch.stack([weight[r : r + height, c : c + width].abs().max() for c in range(0, columns, width)])
            for r in range(0, rows, height)
        ])  # fmt: skip
        scales /= FP8_LARGEST
        spread = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        stored = scales if block or by_row else scales.view(())
        return Written({"weight": codes, name: stored}, codes.float() * spread)

    if method == "compressed-tensors":
        scheme: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        scheme["strategy"] = "block" if block else "channel" if by_row else "tensor"
        scheme |= {"block_structure": list(block)} if block else {}
        return Format(_compressed_config("float-quantized", scheme), write)
    said = {"quant_method": method, "activation_scheme": "dynamic"}
    return Format({**said, "weight_block_size": list(block)} if block else said, write)


FORMATS: Mapping[str, Callable[[], Format]] = {
    "bitsandbytes NF4": lambda: nf4(),
    "bitsandbytes NF4, absmax not nested": lambda: nf4(is_nested=False),
    "bitsandbytes NF4, blocks of 128": lambda: nf4(block=128),
    "bitsandbytes NF4, blocks of 32": lambda: nf4(block=32),
    "bitsandbytes FP4": lambda: nf4(kind="fp4"),
    "bitsandbytes 8 bits": int8,
    "AWQ": lambda: awq(),
    "AWQ, groups of 64": lambda: awq(group=64),
    "AWQ, groups of 32": lambda: awq(group=32),
    "AWQ, one group a row": lambda: awq(group=-1),
    "GPTQ": lambda: gptq(),
    "GPTQ, groups of 64, not symmetric": lambda: gptq(group=64, is_symmetric=False),
    "GPTQ, groups of 32, act-order": lambda: gptq(group=32, act_order=True),
    "GPTQ, act-order, not symmetric": lambda: gptq(act_order=True, is_symmetric=False),
    "GPTQ, one group a row": lambda: gptq(group=-1),
    "GPTQ, second version": lambda: gptq(is_symmetric=False, version=2),
    "GPTQ, 8 bits": lambda: gptq(bits=8),
    "GPTQ, 8 bits, one group a row, act-order": lambda: gptq(bits=8, group=-1, act_order=True),
    "compressed-tensors W4A16": lambda: compressed(),
    "compressed-tensors W4A16, groups of 32, not symmetric": lambda: compressed(group=32, is_symmetric=False),
    "compressed-tensors W4A16, act-order": lambda: compressed(group=64, act_order=True),
    "compressed-tensors W4A16, one scale a row": lambda: compressed(group=-1),
    "compressed-tensors W8A16": lambda: compressed(bits=8, group=-1),
    "compressed-tensors W8A16, groups of 128": lambda: compressed(bits=8),
    "compressed-tensors W8A16, not symmetric": lambda: compressed(bits=8, group=-1, is_symmetric=False),
    "compressed-tensors int8": lambda: compressed(bits=8, group=-1, packed=False),
    "compressed-tensors int8, not symmetric": lambda: compressed(bits=8, group=-1, is_symmetric=False, packed=False),
    "compressed-tensors FP8": lambda: fp8(method="compressed-tensors", by_row=True),
    "compressed-tensors FP8, one scale": lambda: fp8(method="compressed-tensors"),
    "compressed-tensors FP8, blocks": lambda: fp8(method="compressed-tensors", block=(128, 128)),
    "FP8, blocks of 128 × 128": lambda: fp8(block=(128, 128)),
    "FP8, blocks of 48 × 80": lambda: fp8(block=(48, 80)),
    "FP8, one scale": lambda: fp8(),
    "FP8 of FBGEMM": lambda: fp8(method="fbgemm_fp8", by_row=True),
}
