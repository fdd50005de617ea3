"""The tensors of a model that is in memory, watched without being held: where they are, and whether they are gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadstone.hardware import process_rss, resident_bytes
from loadstone.loaded import LoadedModel
from loadstone.memory import device_memory

from .receipt import Footprint

if TYPE_CHECKING:  # brings torch
    import torch

KINDS = ("weights", "store_pages", "kv_cache")


@dataclass(frozen=True)
class Piece:
    """A tensor: its name, its kind, its place in the processor's memory (0 elsewhere), and its storage, held weakly.

    A view keeps the storage too: one number of a tensor is enough to keep all of it.
    """

    name: str
    kind: str
    address: int
    nbytes: int
    storage: Any  # torch's StorageWeakRef

    @property
    def is_alive(self) -> bool:
        """Whether somebody still has the tensor, or a view of it."""
        return not self.storage.expired()


def pieces_of(model: LoadedModel) -> list[Piece]:
    """Return the weights and the KV cache of a model that is in memory."""
    decoder, cache = model.decoder, model.engine.cache
    is_mapped = decoder.attached is not None and decoder.device.type == "cpu"
    kind = "store_pages" if is_mapped else "weights"
    found = [_piece(name, kind, tensor) for name, tensor in decoder.tensors()]
    if cache is not None:
        found += [_piece("KV cache", "kv_cache", tensor) for tensor in (cache.keys, cache.values)]
    return found


def _piece(name: str, kind: str, tensor: torch.Tensor) -> Piece:
    from torch.multiprocessing.reductions import StorageWeakRef

    address = tensor.data_ptr() if tensor.device.type == "cpu" else 0
    return Piece(name, kind, address, tensor.nbytes, StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]


def footprint(pieces: Iterable[Piece] = ()) -> Footprint:
    """Return what this process holds now, and how much of it are these pieces, as far as they are alive."""
    alive = [one for one in pieces if one.is_alive]
    here = {kind: _resident([one for one in alive if one.kind == kind and one.address]) for kind in KINDS}
    there = {kind: sum(one.nbytes for one in alive if one.kind == kind and not one.address) for kind in KINDS}
    resident = process_rss()
    allocated, reserved = device_memory()
    return Footprint(
        resident=resident,
        other=max(0, resident - sum(here.values())),
        device_allocated=allocated,
        device_reserved=reserved,
        **{kind: here[kind] + there[kind] for kind in KINDS},
    )


def _resident(pieces: Sequence[Piece]) -> int:
    """Return what of these pieces is in memory now; all of them where the system does not say."""
    found = resident_bytes((one.address, one.nbytes) for one in pieces)
    return sum(one.nbytes for one in pieces) if found is None else found
