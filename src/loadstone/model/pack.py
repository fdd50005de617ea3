"""Checkpoint → parts: reads every piece once, digests it, packs it into the form that is multiplied, in one stream.

Peak memory beside the finished parts is a few buffers, and what a strategy holds of the one or two parts being made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce

import torch

from loadstone.checkpoint import Weights
from loadstone.checkpoint.digests import TensorDigests
from loadstone.checkpoint.disk import Buffer
from loadstone.checkpoint.pieces import Piece
from loadstone.checkpoint.spec import ModelSpec, TensorInfo
from loadstone.checkpoint.weights import float_types
from loadstone.checkpoint.workers import in_threads, own_stream
from loadstone.memory import exact_allocation
from loadstone.planner import Plan
from loadstone.planner.own import kept_coding, kind_of, own_strategy, strategy_of
from loadstone.quantization import find_strategy
from loadstone.quantization.base import Packing
from loadstone.quantization.kernels.openmp import compute_alone
from loadstone.telemetry import Progress, emit

from .recipe import VECTOR, Kept, Part

_PACKED_KEPT_AS = torch.float16  # GGUF's packed types, under `none`: float32 would double what they take

Take = Callable[[Part, Kept, bool], None]
"""Takes a finished part, and whether its numbers are all finite; called by several threads."""


def pack(plan: Plan, spec: ModelSpec, parts: Sequence[Part], weights: Weights, take: Take) -> dict[str, str]:
    """Make every part from a checkpoint's weights and hand it to `take`; return the digest of each tensor.

    Emits `load.progress` after each piece. The first error ends the work and is raised.
    """
    return _Packer(plan, spec, parts, weights, take).run()


@dataclass
class _Making:
    """A part being made: how many pieces are still to come."""

    part: Part
    packing: Packing | VectorPacking
    left: int


class VectorPacking:
    """Stacked norms or biases, in the compute type."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.vector = torch.empty(count, device=device, dtype=dtype)

    def add(self, first: int, rows: torch.Tensor) -> None:
        """Take numbers [first, first + len(rows))."""
        self.vector[first : first + len(rows)] = rows

    def finish(self) -> torch.Tensor:
        """Return the vector."""
        return self.vector


class _Packer:
    def __init__(
        self, plan: Plan, spec: ModelSpec, parts: Sequence[Part], weights: Weights, take: Take
    ) -> None:  # fmt: skip
        self.spec, self.parts, self.weights, self.take = spec, parts, weights, take
        self.strategy = find_strategy(plan.strategy)
        self.device = torch.device(plan.device.torch_name)
        self.dtype: torch.dtype = getattr(torch, plan.settings.compute_dtype)
        self.digests = TensorDigests()
        if spec.quantized is not None and plan.strategy != (own := own_strategy(spec)) and own is not None:
            reason = f"the weights are quantised already ({spec.quantized.summary}); {plan.strategy} adds its own error"
            emit("load.warning", reason=reason, instead="leave quantization out: they are then kept as they are")
        total = sum(tensor.nbytes for tensor in spec.tensors.values())
        self.progress = Progress("load.progress", total, len(spec.tensors), phase="quantise")
        self._lock = threading.Lock()

    def run(self) -> dict[str, str]:
        with exact_allocation():
            in_threads(
                self._tasks(), self._work, buffer_bytes=self.weights.piece_bytes, is_pinned=self.device.type == "cuda",
                around=lambda: _computing_alone(self.device),
            )  # fmt: skip
        return self.digests.by_name()

    def _tasks(self) -> Iterator[tuple[_Making, int, Piece]]:
        """Yield every piece, with the part it belongs to and its first row there; a part is begun with its first."""
        for part in self.parts:
            pieces = [piece for name in part.tensors for piece in self.weights.pieces(name)]
            making = _Making(part, self._begin(part), len(pieces))
            row = 0
            for piece in pieces:
                yield making, row, piece
                row += piece.count

    def _begin(self, part: Part) -> Packing | VectorPacking:
        tensors = [self.spec.tensors[name] for name in part.tensors]
        rows = sum(tensor.shape[0] for tensor in tensors)
        if part.kind == VECTOR:
            return VectorPacking(rows, self.device, self.dtype)
        columns = tensors[0].shape[1]
        if (coding := kept_coding(self.spec, self.strategy, part.tensors[0])) is not None:
            return self.strategy.coded_packing(coding, rows, columns, device=self.device, dtype=self.dtype)
        source = reduce(torch.promote_types, map(self._type, tensors))
        return strategy_of(self.spec, self.strategy, part.tensors[0]).packing(
            kind_of(self.spec, self.strategy, part.tensors[0]), rows, columns,
            source=source, device=self.device, dtype=self.dtype,
        )  # fmt: skip

    def _work(self, task: tuple[_Making, int, Piece], buffer: Buffer) -> None:
        making, row, piece = task
        raw = self.weights.read(piece, buffer)
        is_last_of_tensor = self.digests.add(piece, raw)
        if piece.tensor.coding is None or isinstance(making.packing, VectorPacking):
            making.packing.add(row, self.weights.numbers(piece, raw).to(self._type(piece.tensor)))
        else:
            for first, rows in self.weights.coded(piece, raw):
                making.packing.add_coded(row + first, rows)
        with self._lock:
            making.left -= 1
            is_whole = making.left == 0
        if is_whole:
            self._finish(making)
        self.progress.add(piece.nbytes, is_last_of_tensor=is_last_of_tensor)

    def _finish(self, making: _Making) -> None:
        made = making.packing.finish()
        tensors = [made] if isinstance(made, torch.Tensor) else list(made.tensors().values())
        self.take(making.part, made, all(map(_is_finite, tensors)))

    def _type(self, tensor: TensorInfo) -> torch.dtype:
        """Return the type that numbers of a type on disk are packed from."""
        keeper = strategy_of(self.spec, self.strategy, tensor.name)
        packed = _PACKED_KEPT_AS if keeper.name == "none" else torch.float32
        return float_types().get(tensor.dtype, packed)


def warn_of_numbers(part: Part) -> None:
    """Tell that a part's weights hold NaN or infinity."""
    emit("load.warning", reason="weights hold NaN or infinity; answers may be noise", tensors=list(part.tensors))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    extremes = torch.stack(torch.aminmax(tensor))  # one pass and no copy; NaN comes through as both
    return bool(torch.isfinite(extremes).all())


def _computing_alone(device: torch.device) -> AbstractContextManager[object]:
    """Return what a loading thread runs in: no helpers on the processor, a stream of its own on a GPU."""
    compute_alone()
    return own_stream(device)
