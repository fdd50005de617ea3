"""Turns a model's files into a `ModelSpec`, from their headers alone.

Reads no weights and needs no torch. Whatever is wrong with the files is a CheckpointError that names file and
cause.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from loadstone.errors import CheckpointError
from loadstone.telemetry import emit

from . import config_json, gguf, gguf_model, safetensors
from .architectures import Architecture
from .coding import Quantized
from .layout import Sizes, expected_tensors, select_tensors
from .listing import LISTING, read_listing
from .opening import Readable
from .quantized import join_weights, method_of
from .spec import ModelSpec, TensorInfo

INDEX = "model.safetensors.index.json"
ALL_HERE: Mapping[Path, Readable] = MappingProxyType({})
_SAFETENSORS_TYPES = ("BF16", "F16", "F32")


class Files(Protocol):
    """The files of one model, as a source gives them."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def weights(self) -> tuple[Path, ...]: ...
    @property
    def origin(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def format(self) -> str: ...


def inspect(files: Files, remote: Mapping[Path, Readable] = ALL_HERE) -> ModelSpec:
    """Return what the headers of a model's files say, all of it checked.

    Of weights that are not on this machine, `remote` gives the bytes.

    Raises CheckpointError, naming file and cause, for files that are damaged, incomplete, contradict one
    another, or are of a kind that is not read.
    """
    if not files.weights and not (files.folder / LISTING).is_file():
        raise CheckpointError("there are no weights", file=files.folder, hint="Fetch the checkpoint again.")
    return _inspect_gguf(files, remote) if files.format == "gguf" else _inspect_safetensors(files, remote)


def _inspect_safetensors(files: Files, remote: Mapping[Path, Readable]) -> ModelSpec:
    config_file = files.folder / "config.json"
    config = config_json.read_json(config_file)
    architecture = config_json.architecture_of(config, config_file)
    sizes = config_json.sizes_of(config, architecture, config_file)
    method = method_of(config, config_file)
    found = _gather(files, remote) if files.weights else read_listing(files.folder)
    expected = expected_tensors(architecture, sizes)
    if method is not None:
        found = join_weights(method, found, expected)
    tensors = select_tensors(found, expected, _SAFETENSORS_TYPES, files.folder)
    generation = config_json.read_generation(files.folder)
    is_quantized = any(tensor.coding is not None for tensor in tensors.values())
    quantized = method.about if method is not None and is_quantized else None
    return _spec(files, architecture, sizes, tensors, config, generation, config_file, quantized)


def _inspect_gguf(files: Files, remote: Mapping[Path, Readable]) -> ModelSpec:
    if len(files.weights) != 1:
        raise CheckpointError(
            f"{len(files.weights)} GGUF files make no model; one does",
            file=files.folder,
            hint="Name one of them.",
        )
    header = gguf.read_header(files.weights[0], remote.get(files.weights[0]))
    architecture = gguf_model.architecture_of(header)
    config = gguf_model.config_of(header, architecture)
    sizes = config_json.sizes_of(config, architecture, header.file)
    expected = expected_tensors(architecture, sizes)
    found = {name: _named_type(tensor, name in expected) for name, tensor in gguf_model.hub_tensors(header).items()}
    tensors = select_tensors(found, expected, gguf.READABLE_TYPES, header.file)
    generation, quantized = gguf_model.sampling_of(header), gguf_model.quantized_of(tensors)
    return _spec(files, architecture, sizes, tensors, config, generation, header.file, quantized)


def _spec(
    files: Files,
    architecture: Architecture,
    sizes: Sizes,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    config_file: Path,
    quantized: Quantized | None = None,
) -> ModelSpec:
    starts = config_json.token_ids(config.get("bos_token_id"), "bos_token_id", config_file)
    ends = config_json.token_ids(config.get("eos_token_id"), "eos_token_id", config_file)
    try:
        recommended = config_json.token_ids(generation.get("eos_token_id"), "eos_token_id", files.folder)
    except CheckpointError as error:
        recommended = ()  # generation_config.json only advises
        emit("checkpoint.warning", reason=error.message, file=str(files.folder / "generation_config.json"))
    return ModelSpec(
        name=files.name,
        architecture=architecture,
        format=files.format,
        origin=files.origin,
        revision=files.revision,
        folder=files.folder,
        tensors=tensors,
        config=config,
        generation=generation,
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=tuple(dict.fromkeys((*recommended, *ends))),
        quantized=quantized,
        **vars(sizes),
    )


def _gather(files: Files, remote: Mapping[Path, Readable]) -> dict[str, TensorInfo]:
    """The tensors of all shards; the index, when it is these shards', says which shard each must be in."""
    shards = {file.name: file for file in files.weights}
    places = _index(files.folder / INDEX, shards)
    found: dict[str, TensorInfo] = {}
    for shard in files.weights:
        for name, tensor in safetensors.read_header(shard, remote.get(shard)).items():
            if places and places.get(name, shard.name) != shard.name:
                continue
            if name in found:
                raise CheckpointError(
                    f"tensor {name!r} is in {found[name].file.name} too", file=shard,
                    hint="Shards of different models share a folder: fetch the checkpoint into an empty one.",
                )  # fmt: skip
            found[name] = tensor
    for name, place in places.items():
        if name not in found:
            raise CheckpointError(
                f"tensor {name!r} is missing, which {INDEX} says is in it", file=shards[place],
                hint="The shard is damaged or of another revision: download it again.",
            )  # fmt: skip
    return found


def _index(file: Path, shards: Mapping[str, Path]) -> dict[str, str]:
    """Which shard each tensor is in, or nothing when there is no index or it is about other files."""
    if not file.exists():
        return {}
    places = config_json.read_json(file).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError("its weight_map does not map tensors to files", file=file)
    names = set(places.values())
    if not names & set(shards):
        return {}
    for name in sorted(names - set(shards)):
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"it points outside its folder, to {name!r}", file=file,
                hint="Do not use this checkpoint; fetch it from its publisher.",
            )  # fmt: skip
        raise CheckpointError(f"shard {name!r} is missing", file=file, hint="Fetch the checkpoint again.")
    return places


def _named_type(tensor: TensorInfo, is_needed: bool) -> TensorInfo:
    """The tensor with the name of a type that is not read, for the error that is about to be raised."""
    if not is_needed or tensor.dtype in gguf.READABLE_TYPES:
        return tensor
    from ._gguf import type_name  # only on the way to an error: its import takes time

    return replace(tensor, dtype=type_name(int(tensor.dtype.removeprefix("type "))))
