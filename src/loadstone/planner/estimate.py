"""How many bytes a model takes, part by part and phase by phase: pure arithmetic on what the headers say.

Knows shapes and strategies, not devices' limits; reads no file and loads no torch. Each figure is meant to
be a little too high: a load that was promised and then killed is worse than one refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadstone.checkpoint.quantized import pieces_of
from loadstone.checkpoint.quantized.base import STRIP_NUMBERS
from loadstone.checkpoint.weights import PIECE_NUMBERS, PIECE_NUMBERS_PACKED, room_of
from loadstone.checkpoint.workers import thread_count
from loadstone.hardware.device import MemorySettings
from loadstone.quantization.base import Strategy
from loadstone.quantization.kernels.words import KV_BLOCK

from .own import kept_coding, kind_of, strategy_of

if TYPE_CHECKING:
    from loadstone.checkpoint.spec import ModelSpec, TensorInfo

PARTS = ("linear", "lm_head", "embedding", "norm")
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Added to what a step needs, for what an allocator keeps between tensors of different sizes.
ACTIVATION_MARGIN = 0.25
# Of an embedding that is only looked up in, and stays in the store's file: what the process has of it at most.
RARELY_USED_BYTES = 64 << 20
# Weights that are read together and kept as one product: gate and up (q, k and v are smaller).
STACKED = 2
# Tokens in one step of decoding, and how many of them one text can have, with what is guessed.
LARGEST_STEP, GUESSED = 64, 16
LOGITS_COPIES = 8  # of one row: scaled, sorted, their probabilities
NOTED = 400  # bytes for a token of a text: its number, where it came before, the block of the cache that it is in

# What all tokens of a decoding step may see of the cache together, copied side by side for one layer, at most. On the
# processor it is less than unpacking takes, which is over by then, since copies cost more there than calls do.
GATHERED = 256 << 20
GATHERED_ON_CPU = 16 << 20

_FLOAT = 4  # intermediate results are counted as float32, whatever type the products are made in
_HIDDEN_COPIES = 6  # residual, normed, attention's and the MLP's results, and the sums of the two
_UNPACKING = 12  # bytes a number: packed, unpacked, and what lies between in the threads that are at it
_PLAIN_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Estimate:
    """What one way to run a model takes, in bytes.

    `weight_bytes` is by part: "linear", "lm_head", "embedding", and "norm" (norms and biases). `buffers` has the
    largest tensors that are in one piece, by what they hold.
    """

    weight_bytes: Mapping[str, int]
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int
    load_peak_bytes: int
    buffers: Mapping[str, int]

    @property
    def largest_buffer(self) -> tuple[str, int]:
        """What the largest tensor holds, and its bytes."""
        return max(self.buffers.items(), key=lambda one: one[1])

    @property
    def weights(self) -> int:
        """All weights as kept."""
        return sum(self.weight_bytes.values())

    @property
    def steady_bytes(self) -> int:
        """What is held while answering: weights, KV cache, activations and the runtime."""
        return self.weights + self.kv_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def needed_bytes(self) -> int:
        """The most at any time: loading or answering, whichever takes more."""
        return max(self.load_peak_bytes, self.steady_bytes)


def estimate_weights(spec: ModelSpec, strategy: Strategy, settings: MemorySettings, device_kind: str) -> dict[str, int]:
    """Return the bytes of the weights as kept, by part; all parts are named, also those of 0 bytes.

    A tied embedding is kept once, as "embedding". What is not quantised stays on the processor in the type
    that it is read in, elsewhere in the compute type; norms and biases are in the compute type everywhere.
    """
    compute = dtype_bytes(settings.compute_dtype)
    parts = dict.fromkeys(PARTS, 0)
    for name, tensor in spec.tensors.items():
        part = spec.part_of(name)
        if part == "lm_head" and spec.tied_embeddings:
            continue
        if len(tensor.shape) == 2 and part != "norm":
            rows, columns = tensor.shape
            number = _bytes_unquantised(spec, tensor) if device_kind == "cpu" else compute
            if (coding := kept_coding(spec, strategy, name)) is not None:
                parts[part] += strategy.coded_bytes(coding, rows, columns)
                continue
            kind = kind_of(spec, strategy, name)
            keeper = strategy_of(spec, strategy, name)
            parts[part] += keeper.weight_bytes(kind, rows, columns, dtype_bytes=number)
        else:
            parts["norm"] += tensor.elements * compute
    return parts


def estimate_kv(spec: ModelSpec, settings: MemorySettings, *, context: int, streams: int) -> int:
    """Return the bytes of the KV cache for `streams` conversations of `context` tokens, each of whole blocks."""
    return spec.kv_elements_per_token * cache_tokens(context, streams) * dtype_bytes(settings.cache_dtype)


def cache_tokens(context: int, streams: int) -> int:
    """Return how many tokens the KV cache has places for."""
    return -(-context // KV_BLOCK) * KV_BLOCK * streams


def estimate_activations(
    spec: ModelSpec, settings: MemorySettings, device_kind: str, *, context: int, streams: int
) -> int:
    """Return the bytes that the largest step needs beside weights and cache: a chunk of a prompt, and all who answer.

    Counts one layer, since each layer's results are given up before the next: its states, its attention, and the
    logits. Tables of positions, and what is noted of each token of a text, are counted here too.
    """
    tokens = min(settings.prefill_chunk, context) + min(streams, LARGEST_STEP)
    logits = (min(max(streams, GUESSED), LARGEST_STEP) + LOGITS_COPIES) * spec.vocab_size * _FLOAT
    positions = context * spec.head_size * dtype_bytes(settings.compute_dtype)  # cosines and sines, half a head each
    noted = NOTED * cache_tokens(context, streams)
    if device_kind == "cpu":
        step = _cpu_step(spec, settings, tokens, context)
    else:
        step = _accelerator_step(spec, settings, device_kind, tokens, context)
    counted = step + logits + positions
    return round(counted * (1 + ACTIVATION_MARGIN)) + noted


def _cpu_step(spec: ModelSpec, settings: MemorySettings, tokens: int, context: int) -> int:
    """Return the bytes of a step on the processor.

    A step of decoding has buffers of its own, which stay. Attention of a chunk takes a text's keys and values together
    as they are kept, and in the compute type; torch makes its scores block by block, and only the mask is whole, as
    truth values and as numbers.
    """
    widest = max(spec.intermediate_size, spec.hidden_size)
    attention = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_size  # queries, keys and values, and what is seen
    row = 4 * spec.hidden_size + attention + 2 * spec.intermediate_size + 2 * widest
    gathered = spec.kv_heads * spec.head_size * context * (2 * _FLOAT + dtype_bytes(settings.cache_dtype))
    mask = tokens * context * (1 + _FLOAT)
    scores = settings.threads * context * _FLOAT
    return (tokens + LARGEST_STEP) * row * _FLOAT + gathered + mask + scores


def _accelerator_step(spec: ModelSpec, settings: MemorySettings, device_kind: str, tokens: int, context: int) -> int:
    """Return the bytes of a step on an accelerator, where a packed weight is made whole for a product of many rows."""
    hidden = _HIDDEN_COPIES * spec.hidden_size
    rotated = 2 * (spec.heads + 2 * spec.kv_heads) * spec.head_size  # before and after rotation
    inner = 3 * spec.intermediate_size  # gate, up and their product
    scores = _scores(spec, tokens, context)
    unpacked = _stacked(spec) * dtype_bytes(settings.compute_dtype)
    # Steps that are recorded have memory of their own, which nothing else uses.
    recorded = unpacked + GATHERED if device_kind == "cuda" else 0
    return tokens * (hidden + rotated + inner) * _FLOAT + scores + unpacked + recorded


def _scores(spec: ModelSpec, tokens: int, context: int) -> int:
    """Return the bytes that attention's scores take on an accelerator, in one piece."""
    return tokens * spec.heads * context * _FLOAT


def estimate_buffers(spec: ModelSpec, settings: MemorySettings, *, context: int, streams: int) -> dict[str, int]:
    """Return the largest tensors on an accelerator: a weight while it is made, keys or values, and a chunk's scores."""
    tokens = min(settings.prefill_chunk, context) + min(streams, LARGEST_STEP)
    return {
        "the largest weight": _largest_weight(spec) * dtype_bytes(settings.compute_dtype),
        "the keys of the KV cache": estimate_kv(spec, settings, context=context, streams=streams) // 2,
        "attention of a chunk": _scores(spec, tokens, context),
    }


def gathered_bytes(device_kind: str) -> int:
    """Return how much a step of decoding may copy of the cache for one layer, in bytes."""
    return GATHERED_ON_CPU if device_kind == "cpu" else GATHERED


def place_bytes(heads: int, kv_heads: int, head_size: int, compute: int, cache: int) -> int:
    """Return what a token of a decoding step takes for each place that it sees: key and value, and the scores.

    `compute` and `cache` are the sizes of their types in bytes.
    """
    copies = compute if compute == cache else compute + cache
    return 2 * kv_heads * head_size * copies + heads * (2 * _FLOAT + 2 * compute)


def estimate_load(spec: ModelSpec, strategy: Strategy, settings: MemorySettings, device_kind: str) -> int:
    """Return the bytes that loading holds at its worst beside the weights already kept.

    A few threads read pieces of tensors, each into its own buffer. Most strategies pack a piece as it comes; one that
    needs a weight whole holds that beside its result, as a GPU does in the compute type: as it arrives, and quantised.
    """
    buffers = thread_count() * max((_piece_bytes(tensor) for tensor in spec.tensors.values()), default=0)
    if device_kind != "cpu":
        shared = buffers if device_kind == "mps" else 0  # a Mac's GPU has no memory of its own
        return 2 * _largest_weight(spec) * dtype_bytes(settings.compute_dtype) + shared
    if not strategy.needs_whole_weights:
        # Scales are float32 until all of a weight's are known; two or three weights are in the making at a time.
        return buffers + _stacked(spec) // 2

    def held(tensor: TensorInfo) -> int:
        return tensor.elements * _bytes_as_read(tensor)

    inner = max((held(tensor) for tensor in _linear(spec)), default=0)
    return buffers + 2 * max([STACKED * inner, *(held(tensor) for tensor in _outer(spec))])


def _piece_bytes(tensor: TensorInfo) -> int:
    """Return what a piece of a tensor takes while it is read and packed."""
    if tensor.coding is not None:
        # Of a listing in place of files there are no pieces, nor is anything read then.
        read = max((room_of(piece) for piece in pieces_of(tensor)), default=0) if tensor.parts else 0
        return read + STRIP_NUMBERS * _UNPACKING
    if tensor.dtype in _PLAIN_FLOATS:
        return min(tensor.elements, PIECE_NUMBERS) * _PLAIN_FLOATS[tensor.dtype]
    return min(tensor.elements, PIECE_NUMBERS_PACKED) * _UNPACKING


def _linear(spec: ModelSpec) -> list[TensorInfo]:
    return [tensor for name, tensor in spec.tensors.items() if spec.part_of(name) == "linear"]


def _outer(spec: ModelSpec) -> list[TensorInfo]:
    return [tensor for name, tensor in spec.tensors.items() if spec.part_of(name) != "linear"]


def _largest_weight(spec: ModelSpec) -> int:
    """Return how many numbers the largest weight has, as it is kept."""
    return max([_stacked(spec), *(tensor.elements for tensor in _outer(spec))])


def _stacked(spec: ModelSpec) -> int:
    """Return how many numbers the largest product of a layer has."""
    return STACKED * max((tensor.elements for tensor in _linear(spec)), default=0)


def _bytes_as_read(tensor: TensorInfo) -> int:
    """Return the size of one number once read: what is packed in its file is unpacked to float32."""
    return _PLAIN_FLOATS.get(tensor.dtype, _FLOAT)


def _bytes_unquantised(spec: ModelSpec, tensor: TensorInfo) -> int:
    """Return the size of one number kept unquantised: as read, but what was unpacked narrowed to 16 bits."""
    size = _bytes_as_read(tensor)
    return min(size, 2) if spec.format == "gguf" or tensor.coding is not None else size


def dtype_bytes(name: str) -> int:
    """Return the size of one number of the type that torch calls `name`; 4 when it is not known."""
    return DTYPE_BYTES.get(name.removeprefix("torch."), 4)


class Estimator:
    """Estimates one model kept one way on one kind of device, at any context; weights are counted once."""

    def __init__(
        self,
        spec: ModelSpec,
        strategy: Strategy,
        settings: MemorySettings,
        *,
        device_kind: str,
        streams: int,
        runtime_bytes: int,
        is_kept: bool = False,
    ) -> None:
        self._spec, self._settings, self._kind = spec, settings, device_kind
        self._streams, self._runtime = streams, runtime_bytes
        self._weights = estimate_weights(spec, strategy, settings, device_kind)
        is_mapped = is_kept and device_kind == "cpu"
        if is_mapped and not spec.tied_embeddings:
            self._weights["embedding"] = min(self._weights["embedding"], RARELY_USED_BYTES)
        self._loading = 0 if is_mapped else estimate_load(spec, strategy, settings, device_kind)

    def at(self, context: int) -> Estimate:
        """Return what `context` tokens a stream take."""
        spec, settings, streams = self._spec, self._settings, self._streams
        return Estimate(
            weight_bytes=self._weights,
            kv_bytes=estimate_kv(spec, settings, context=context, streams=streams),
            activation_bytes=estimate_activations(spec, settings, self._kind, context=context, streams=streams),
            runtime_bytes=self._runtime,
            load_peak_bytes=sum(self._weights.values()) + self._loading + self._runtime,
            buffers=estimate_buffers(spec, settings, context=context, streams=streams),
        )

    def longest(self, fits: Callable[[Estimate], bool], *, shortest: int, longest: int, step: int = 64) -> int | None:
        """Return the longest context that fits, or None when not even `shortest` does.

        What fits also fits shorter. It is a multiple of `step`, or one of the two bounds.
        """
        if fits(self.at(longest)):
            return longest
        if not fits(self.at(shortest)):
            return None
        low, high = shortest // step, -(-longest // step)  # low fits (or is the bound itself), high does not
        while high - low > 1:
            middle = (low + high) // 2
            if fits(self.at(max(middle * step, shortest))):
                low = middle
            else:
                high = middle
        return max(low * step, shortest)
