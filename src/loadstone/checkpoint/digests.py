"""What the weights of a checkpoint are, said by their content: one digest a tensor, whatever file it is in.

A tensor's digest is that of its pieces' digests, so that pieces can be read and digested in any order.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loadstone._blake3 import digest, digest_of_all
from loadstone.telemetry import Progress

from .pieces import Piece
from .weights import Weights
from .workers import in_threads

if TYPE_CHECKING:
    import torch

    from .disk import Buffer


class TensorDigests:
    """Gathers the digests of pieces into those of tensors; safe to use from several threads."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, str]] = {}
        self._rows: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, piece: Piece, raw: Sequence[torch.Tensor]) -> bool:
        """Take the bytes of a piece, as `Weights.read` returns them; tell whether its tensor is whole with them."""
        each, name = [digest(one.numpy()) for one in raw], piece.tensor.name
        found = each[0] if len(each) == 1 else digest_of_all(each)
        with self._lock:
            self._pieces.setdefault(name, {})[piece.first] = found
            self._rows[name] = self._rows.get(name, 0) + piece.count
            return self._rows[name] == piece.tensor.shape[0]

    def of(self, name: str) -> str:
        """Return the digest of the tensor called `name`, all of whose pieces must have come."""
        return digest_of_all(found for _, found in sorted(self._pieces[name].items()))

    def by_name(self) -> dict[str, str]:
        """Return the digest of each tensor, by name."""
        return {name: self.of(name) for name in self._pieces}


def same_content(weights: Weights, wanted: Mapping[str, str]) -> bool:
    """Tell whether the tensors named in `wanted` have these digests, reading no further than the first that has not.

    Emits `load.progress`. Small tensors are looked at first: a model trained on from another differs in one of them
    sooner or later.
    """
    pieces = {name: weights.pieces(name) for name in wanted}
    by_size = sorted(wanted, key=lambda name: sum(piece.nbytes for piece in pieces[name]))
    total = sum(piece.nbytes for found in pieces.values() for piece in found)
    progress = Progress("load.progress", total, len(pieces), phase="compare")
    digests = TensorDigests()

    def compare(piece: Piece, buffer: Buffer) -> None:
        name = piece.tensor.name
        is_whole = digests.add(piece, weights.read(piece, buffer))
        if is_whole and digests.of(name) != wanted[name]:
            raise _DifferentError
        progress.add(piece.nbytes, is_last_of_tensor=is_whole)

    try:
        in_threads(
            (piece for name in by_size for piece in pieces[name]), compare, buffer_bytes=weights.piece_bytes
        )  # fmt: skip
    except _DifferentError:
        return False
    return True


class _DifferentError(Exception):
    """One tensor is another: there is nothing more to look at."""
