"""A loaded model as a checkpoint that transformers loads again: bitsandbytes' 4 or 8 bits, or plain floats.

What our strategies and bitsandbytes keep alike goes over as it is; embedding, head, norms, and what bitsandbytes has no
form for are written as bfloat16, as transformers keeps them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loadstone.checkpoint.spec import ModelSpec
from loadstone.errors import ConfigurationError, GenerationError, handle_exceptions
from loadstone.quantization.codes import BLOCK, NF4
from loadstone.quantization.linear import DenseLinear, Int8Linear, Linear, Nf4Linear, Rows
from loadstone.telemetry import timed
from loadstone.units import parse_size

from .lent import Loan
from .shards import Written, write_checkpoint

DEFAULT_SHARD = "5GB"
_CANNOT = ("state_dict", "push_to_hub", "variant", "distributed_checkpoint")
_PIECE = 1 << 24  # numbers that are made at a time
_NF4, _INT8 = "4bit", "8bit"


@dataclass
class _Checkpoint:
    """What is to be written, and what config.json says of it."""

    float_type: torch.dtype  # of all that is not quantised: transformers wants one
    method: str | None  # how bitsandbytes keeps the quantised ones
    tensors: list[Written] = field(default_factory=list)
    is_doubly: bool = False
    kept_whole: list[str] = field(default_factory=list)  # modules that are not quantised


def save(
    config: Any, generation: Any, loan: Loan, spec: ModelSpec, folder: str | os.PathLike[str],
    max_shard_size: int | str, settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write weights, config.json and generation_config.json into `folder`, which is made where it is not there.

    Memory grows by some tens of megabytes. Raises ConfigurationError for what cannot be meant, ModelNotLoadedError once
    the model is unloaded, ResourceError where the disk has no room, and GenerationError where it cannot be written.
    """
    place, most = _checked(spec, folder, max_shard_size, settings)
    with timed("save", model=spec.name, folder=str(place)) as told, handle_exceptions("save it", into=GenerationError):
        place.mkdir(parents=True, exist_ok=True)
        made = _checkpoint_of(loan, spec)
        told["bytes"] = sum(one.nbytes for one in made.tensors)
        write_checkpoint(place, made.tensors, most)
        _config_for(config, made).save_pretrained(place)
        generation.save_pretrained(place)


def _checked(
    spec: ModelSpec, folder: str | os.PathLike[str], max_shard_size: int | str, settings: Mapping[str, Any]
) -> tuple[Path, int]:
    asked = [name for name in _CANNOT if settings.get(name)]
    if asked:
        raise ConfigurationError(
            f"save_pretrained() of a loaded model takes no {asked[0]}",
            hint="Save it into a folder, and do the rest from there.",
        )
    place = Path(folder)
    if place.exists() and (not place.is_dir() or place.resolve() == spec.folder.resolve()):
        why = "is the model's own" if place.is_dir() else "is a file"
        raise ConfigurationError(f"{place} {why}", hint="Name another folder; it is made where it is not there.")
    try:
        return place, parse_size(max_shard_size)
    except ValueError as error:
        raise ConfigurationError(f"max_shard_size: {error}") from error


def _config_for(config: Any, made: _Checkpoint) -> Any:
    said = config.to_dict()
    said.pop("_name_or_path", None)
    said["dtype"] = str(made.float_type).removeprefix("torch.")
    if made.method is not None:
        said["quantization_config"] = {
            "quant_method": "bitsandbytes", "load_in_4bit": made.method == _NF4, "load_in_8bit": made.method == _INT8,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": made.is_doubly, "llm_int8_skip_modules": ["lm_head", *made.kept_whole],
        }  # fmt: skip
    return type(config).from_dict(said)


# -- weights ------------------------------------------------------------------------------------------------------


def _checkpoint_of(loan: Loan, spec: ModelSpec) -> _Checkpoint:
    weights = loan.weights()
    forms = {name: _form(one)[0] for name, one in weights.items() if isinstance(one, Linear)}
    layers = [form for name, form in forms.items() if spec.part_of(name) == "linear"]
    ways = ((_NF4, any(map(_is_nf4, layers))), (_INT8, any(isinstance(form, Int8Linear) for form in layers)))
    method = next((name for name, is_so in ways if is_so), None)
    embedding = forms["model.embed_tokens.weight"]
    is_dense = method is None and isinstance(embedding, DenseLinear)
    made = _Checkpoint(embedding.weight.dtype if is_dense else torch.bfloat16, method)  # type: ignore[attr-defined]
    for name, kept in weights.items():
        if isinstance(kept, Linear):
            made.tensors += _matrix(name, kept, spec.part_of(name) == "linear", made)
        else:
            made.tensors.append(_whole(name, kept.to(made.float_type)))
    return made


def _matrix(name: str, kept: Linear, is_layer: bool, made: _Checkpoint) -> list[Written]:
    """Return a matrix as bitsandbytes' form has it where that is the checkpoint's, else as floats."""
    form, _ = _form(kept)
    if is_layer and made.method == _NF4 and _is_nf4(form):
        made.is_doubly |= "absmax2" in form.tensors() and form is kept
        return _nf4(name, kept)
    if is_layer and made.method == _INT8 and isinstance(form, Int8Linear):
        return _int8(name, kept)
    if is_layer and made.method is not None:
        made.kept_whole.append(name.removesuffix(".weight"))
    dtype = made.float_type
    return [_by_rows(name, kept, dtype, lambda start, stop: kept.dequantize(start, stop, dtype))]


def _form(kept: Linear) -> tuple[Linear, int]:
    """Return the weight that has the rows, and the first of them in it."""
    return (kept.whole, kept.start) if isinstance(kept, Rows) else (kept, 0)


def _is_nf4(form: Linear) -> bool:
    return isinstance(form, Nf4Linear) or "absmax2" in form.tensors()


def _nf4(name: str, kept: Linear) -> list[Written]:
    """Return NF4 codes with their absmax: nested where they are, as they are; else as float32."""
    form, first = _form(kept)
    count, tensors = kept.rows * kept.columns, kept.tensors()
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16"}
    facts["shape"] = [kept.rows, kept.columns]
    if "absmax2" in tensors and form is kept:
        facts |= {
            "nested_blocksize": int(kept.facts["blocksize2"]), "nested_dtype": "float32",
            "nested_offset": float(tensors["offset"]),
        }  # fmt: skip
        more = [
            _whole(f"{name}.absmax", tensors["absmax"]),
            _whole(f"{name}.nested_absmax", tensors["absmax2"]),
            _whole(f"{name}.nested_quant_map", tensors["code2"]),
        ]
        codes = _whole(name, tensors["codes"].view(-1, 1))
    else:
        scale = form.facts.get("scale", 1.0)

        def rows(index: int) -> Callable[[int, int], torch.Tensor]:
            return lambda start, stop: form.rows_of(first + start, first + stop)[index]  # type: ignore[attr-defined]

        absmax = rows(1)
        codes = _by_rows(name, kept, torch.uint8, rows(0), (count // 2, 1))
        more = [
            _by_rows(
                f"{name}.absmax", kept, torch.float32, lambda start, stop: absmax(start, stop).float() * scale,
                (count // BLOCK,),
            )
        ]  # fmt: skip
    said = torch.tensor([*json.dumps(facts).encode()], dtype=torch.uint8)
    table = torch.tensor(NF4)
    return [codes, *more, _whole(f"{name}.quant_map", table), _whole(f"{name}.quant_state.bitsandbytes__nf4", said)]


def _int8(name: str, kept: Linear) -> list[Written]:
    """Return 8-bit numbers with the largest of each row, which bitsandbytes keeps where we keep its 127th part."""
    form, first = _form(kept)
    assert isinstance(form, Int8Linear)
    path = name.removesuffix(".weight")
    return [
        _by_rows(name, kept, torch.int8, lambda start, stop: form.rows_of(first + start, first + stop)),
        _whole(f"{path}.SCB", form.scales[first : first + kept.rows] * 127.0),
        _whole(f"{path}.weight_format", torch.zeros((), dtype=torch.uint8)),
    ]


def _whole(name: str, tensor: torch.Tensor) -> Written:
    return Written(name, tensor.dtype, tuple(tensor.shape), lambda: iter((tensor,)))


def _by_rows(
    name: str, kept: Linear, dtype: torch.dtype, rows: Callable[[int, int], torch.Tensor],
    shape: Sequence[int] | None = None,
) -> Written:  # fmt: skip
    """Return a tensor whose numbers `rows(start, stop)` makes, some at a time."""

    def pieces() -> Iterator[torch.Tensor]:
        step = max(1, _PIECE // kept.columns)
        for start in range(0, kept.rows, step):
            yield rows(start, min(start + step, kept.rows))

    return Written(name, dtype, tuple(shape or (kept.rows, kept.columns)), pieces)
