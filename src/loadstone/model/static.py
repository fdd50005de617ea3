"""A step of decoding whose shapes repeat, for devices where our CPU kernels do not attend.

Tokens, and the blocks of the cache that they see, are rounded up, so few shapes are ever used. One copy tells the
device all that is new in a step, and nothing waits for the device. On CUDA the step is recorded as a graph for each
shape and replayed; elsewhere its calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from loadstone.planner.estimate import gathered_bytes, place_bytes
from loadstone.quantization.kernels.words import KV_BLOCK

from .attention import attend_rows
from .batch import Segment, ended, turned, wanted_rows
from .cache import KVCache, blocks_for
from .layer import Layer
from .recording import Recorder, Recording

if TYPE_CHECKING:
    from .decoder import Decoder

MOST_ROWS = 64  # tokens in one step


class Told:
    """What a step of `rows` tokens, each seeing up to `blocks` blocks, is told; it lies in one tensor.

    On the device: `ids`, `positions` and `wanted` (rows), `tables` (rows × blocks), all int64.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        size = rows * (3 + blocks)
        self._here = torch.zeros(size, dtype=torch.int64, pin_memory=is_cuda)
        self._there = torch.zeros(size, dtype=torch.int64, device=device)
        self._arrived = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self.ids, self.positions, self.wanted, tables = torch.split(self._there, [rows, rows, rows, rows * blocks])
        self.tables = tables.view(rows, blocks)

    def tell(self, ids: Sequence[int], segments: Sequence[Segment]) -> int:
        """Send a step's tokens to the device and return how many rows are wanted.

        Rows that are left over do what the first one does: they write the same keys and values to the same place.
        """
        if self._arrived is not None:
            self._arrived.synchronize()  # the copy before this one is long over, and its source may be overwritten
        rows, blocks = self.tables.shape
        numbers = self._here.numpy()
        all_ids, positions, wanted = numbers[: 3 * rows].reshape(3, rows)
        tables = numbers[3 * rows :].reshape(rows, blocks)
        all_ids[: len(ids)] = ids
        for one, end in ended(segments):
            first, stop = end - one.length, one.start + one.length
            positions[first:end] = range(one.start, stop)
            held = one.block_table[: blocks_for(stop)].numpy()
            tables[first:end, : len(held)] = held
        for part in (all_ids, positions, tables):
            part[len(ids) :] = part[0]
        found = wanted_rows(segments)
        wanted[: len(found)] = found
        self._there.copy_(self._here, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(self._there.device))
        return len(found)


class Rows:
    """Where the tokens of a static step are in the cache, and what each sees: made on the device, for all layers."""

    def __init__(self, told: Told, decoder: Decoder) -> None:
        self._decoder = decoder
        positions = told.positions.unsqueeze(1)
        offsets = torch.arange(KV_BLOCK, device=positions.device)
        places = (told.tables.unsqueeze(2) * KV_BLOCK + offsets).flatten(1)  # of each position, rows × span
        span = torch.arange(places.shape[1], device=positions.device)
        self._new = places.gather(1, positions).flatten()
        # What comes after a token may be anything, even NaN: there each sees its own place, with no weight.
        self._seen = places.gather(1, torch.minimum(span, positions)).flatten()
        after = span > positions
        self._hidden: dict[int | None, torch.Tensor] = {}
        for window in {layer.window for layer in decoder.layers}:
            hidden = after if window is None else after | (span <= positions - window)
            self._hidden[window] = hidden.unsqueeze(1)
        self._turn = [table.index_select(0, told.positions).unsqueeze(1) for table in (decoder.cosines, decoder.sines)]

    def attend(self, qkv: torch.Tensor, layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add the tokens' keys and values to the cache, and return what they see; see `Batch.attend`."""
        cosines, sines = self._turn
        queries, new_keys, new_values = turned(qkv, layer, self._decoder, cosines, sines)
        keys.index_copy_(1, self._new, new_keys.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self._new, new_values.transpose(0, 1).to(values.dtype))
        return attend_rows(queries, self._gathered(keys), self._gathered(values), self._hidden[layer.window])

    def _gathered(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the keys or values that each row sees: kv_heads × rows × span × head_size."""
        shape = (kept.shape[0], len(self._new), -1, kept.shape[2])
        return kept.index_select(1, self._seen).view(shape).to(self._decoder.dtype)


class StaticStep:
    """What all layers do to `rows` tokens that see up to `blocks` blocks each.

    It holds the cache's memory, and what it recorded uses that of the decoder, so it is not to outlive either.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int, blocks: int, recorder: Recorder) -> None:
        self.told = Told(rows, blocks, decoder.device)
        self._keys, self._values = [*cache.keys], [*cache.values]
        self._recorder = recorder
        self._recording: Recording | None = None

    def __call__(self, decoder: Decoder, ids: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
        """Return the states of the rows that are wanted after the layers."""
        wanted = self.told.tell(ids, segments)
        if self._recording is None:
            self._recording = self._recorder.record(lambda: self._run(decoder))
        states = self._run(decoder) if self._recording is None else self._recording()
        return states.index_select(0, self.told.wanted[:wanted])

    def _run(self, decoder: Decoder) -> torch.Tensor:
        return decoder.through_layers(self.told.ids, Rows(self.told, decoder), self._keys, self._values)


class StaticSteps:
    """The static steps of one decoder on one cache by rows and blocks, made when first needed."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], StaticStep] = {}
        self._recorder: Recorder | None = None

    def of(self, decoder: Decoder, cache: KVCache, segments: Sequence[Segment], count: int) -> StaticStep | None:
        """Return the step for these segments of `count` tokens in all; None where it would take too much memory."""
        if self._recorder is None:
            self._recorder = Recorder(decoder.device)
        longest = max(one.start + one.length for one in segments)
        rows = _rounded(count)
        blocks = _rounded(blocks_for(longest), steps=1 if self._recorder.can_record else 4)
        blocks = min(blocks, blocks_for(len(decoder.cosines)))
        if count > MOST_ROWS or rows * blocks * KV_BLOCK > most_places(decoder):
            return None
        if (rows, blocks) not in self._made:
            self._made[rows, blocks] = StaticStep(decoder, cache, rows, blocks, self._recorder)
        return self._made[rows, blocks]


def most_places(decoder: Decoder) -> int:
    """Return how many places of the cache all rows of a step may see together, as far as the plan has counted."""
    each = place_bytes(
        decoder.heads, decoder.kv_heads, decoder.head_size, decoder.dtype.itemsize, decoder.cache_dtype.itemsize
    )
    return gathered_bytes(decoder.device.type) // each


def _rounded(number: int, steps: int = 1) -> int:
    """Return the least of a few sizes that is not below a number from 1 on: so many from each power of two to the next.

    One means few recordings; more mean less that is gathered in vain.
    """
    power = 1 << (number - 1).bit_length()
    unit = max(1, power // (2 * steps))
    return -(-number // unit) * unit
