"""The CPU kernels as functions on torch tensors; `cpu_kernels()` is None where this machine cannot have them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from loadstone.quantization.codes import BLOCK
from loadstone.telemetry import emit

from .openmp import openmp_symbols
from .words import SUMS, AttentionWords, ProductWords, QuantizerWords, ReplayWords, TurningWords

SMALL = 1 << 21  # products of numbers: a thread is done with them by the time that it has woken another
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_lock = threading.Lock()
_found: list[CpuKernels | None] = []

Run = Callable[[Any], None]


class Call:
    """A kernel with its words, which can be called again and again; what the words point to stays alive with it."""

    def __init__(self, function: Run, words: tuple[int, ...], holds: tuple[object, ...]) -> None:
        self._function, self._words, self._holds = function, _array(words), holds

    def __call__(self) -> None:
        self._function(self._words)

    @property
    def function_address(self) -> int:
        """Where the kernel's code is."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]

    @property
    def words_address(self) -> int:
        """Where its words are."""
        return ctypes.addressof(self._words)


class Work:
    """Scratch space of products of at most `count` rows of x with at most `columns`; one call at a time uses it."""

    def __init__(self, count: int, columns: int) -> None:
        self.numbers = torch.empty(count * columns)
        self.scales = torch.empty(count * columns // 32)
        self.sums = torch.empty(torch.get_num_threads() * SUMS * count)


class CpuKernels:
    """Compiled products, quantisers and attention. Tensors are contiguous and on the CPU; x and y are float32.

    Calls are thread-safe: each makes its own scratch space. `is_wide` says whether integers are multiplied in 512-bit
    vectors; None asks the processor.
    """

    def __init__(self, is_wide: bool | None = None) -> None:
        from ._llvm import Compiled, has_features
        from .activations import BEFORE
        from .products import build_products
        from .quantizers import build_quantizers
        from .replay import build_replay
        from .turning import build_turning

        wide = has_features("avx512bw", "avx512vnni") if is_wide is None else is_wide

        def write(module: Any) -> None:
            build_products(module, is_wide=wide)
            build_quantizers(module)
            build_replay(module)
            build_turning(module)

        self.is_wide = wide
        self._compiled = Compiled("products-wide" if wide else "products", write, openmp_symbols())
        names = [kind + before for kind in ("nf4", "int4", "int8", *NAMES.values()) for before in BEFORE]
        names += [f"quantize_{kind}_{name}" for kind in ("nf4", "int4", "int8") for name in NAMES.values()]
        self._functions: dict[str, Run] = {name: self._compiled.function(name) for name in names}
        self._replay, self._turn = self._compiled.function("replay"), self._compiled.function("turn")
        self._attention: dict[tuple[int, torch.dtype], AttentionKernel] = {}

    def product(
        self, kind: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, *,
        rows: int, columns: int, group: int = BLOCK, scale: float = 1.0, norm: torch.Tensor | None = None,
        epsilon: float = 0.0, gated: bool = False, bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return y = f(x)·Wᵀ + bias + residual, M × rows, for x of M × columns.

        `kind` is how W is kept: "nf4" (codes rows × columns/2, scales float16 rows × columns/64, times `scale`), "int4"
        (codes rows × columns/2, scales float16 rows × columns/`group` × 2: each a scale and a zero point, times
        `scale`), "int8" (rows × columns, one float32 scale a row), all as `turned.py` says where the kernels are wide,
        or a float type's name. f is nothing, an RMS norm with weights `norm`, or for `gated` silu of the first half of
        each row of x (M × 2·columns) times the second.
        """
        y = torch.empty(x.shape[0], rows)
        threads = 1 if x.shape[0] * rows * columns <= SMALL else torch.get_num_threads()
        self.product_call(
            kind, x, weight, scales, y=y, work=Work(x.shape[0], columns), group=group, scale=scale, norm=norm,
            epsilon=epsilon, gated=gated, bias=bias, residual=residual, threads=threads,
        )()  # fmt: skip
        return y

    def product_call(
        self, kind: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None, *,
        y: torch.Tensor, work: Work, group: int = BLOCK, scale: float = 1.0, norm: torch.Tensor | None = None,
        epsilon: float = 0.0, gated: bool = False, bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None, threads: int | None = None,
    ) -> Call:  # fmt: skip
        """Return the call that writes `product` of the same arguments into `y` (M × rows).

        As many `threads` work as torch has, unless said otherwise.
        """
        count, rows = y.shape
        before = ".normed" if norm is not None else ".gated" if gated else ""
        is_as_it_is = scales is None and not before  # floats are multiplied where they are
        words = ProductWords(
            x=x.data_ptr(), weights=weight.data_ptr(), scales=_address(scales), y=y.data_ptr(),
            rows=rows, columns=x.shape[1] // (2 if gated else 1), x_rows=count,
            scratch=x.data_ptr() if is_as_it_is else work.numbers.data_ptr(), scratch_scales=work.scales.data_ptr(),
            whole=_bits(scale), threads=threads or torch.get_num_threads(), norm=_address(norm), epsilon=_bits(epsilon),
            bias=_address(bias), residual=_address(residual), sums=work.sums.data_ptr(), group=group // BLOCK,
        )  # fmt: skip
        return Call(self._functions[kind + before], words, (x, weight, scales, y, work, norm, bias, residual))

    def replay(self, calls: Sequence[Call]) -> Call:
        """Return the call that makes all of these, in order."""
        places = [place for call in calls for place in (call.function_address, call.words_address)]
        array = (ctypes.c_int64 * len(places))(*places)
        return Call(self._replay, ReplayWords(ctypes.addressof(array), len(calls)), (array, *calls))

    def quantize_nf4(self, weight: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        """Write a weight's NF4 codes (rows × columns/2, uint8) and absmax (rows × columns/64, float32)."""
        self._quantize("nf4", weight, codes, absmax)

    def turn(self, codes: torch.Tensor, turned: torch.Tensor, first: int) -> None:
        """Write rows of codes (rows × bytes) into `turned` (groups × words × 16 × 4 bytes) from row `first` on.

        Products want 4 and 8 bits so when `is_wide`: a 32-bit word of each of sixteen rows side by side.
        """
        rows, size = codes.shape
        self._turn(_array(TurningWords(codes.data_ptr(), turned.data_ptr(), first, rows, size // 4)))

    def quantize_int8(self, weight: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> None:
        """Write a weight (rows × columns, a multiple of 64) as int8 into `numbers`, and each row's scale (float32)."""
        self._quantize("int8", weight, numbers, scales)

    def quantize_int4(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what `reference.quantize_int4` does."""
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        scales, zeros = torch.empty(2, rows, columns // BLOCK)
        self._quantize("int4", weight, codes, scales, zeros)
        return codes, scales, zeros

    def _quantize(
        self, kind: str, weight: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        addresses = (weight.data_ptr(), numbers.data_ptr(), scales.data_ptr())
        rows, columns = weight.shape
        words = QuantizerWords(*addresses, rows, columns, 1, _address(zeros))  # its callers are many threads already
        self._functions[f"quantize_{kind}_{NAMES[weight.dtype]}"](_array(words))

    def attention(self, head_size: int, cache_dtype: torch.dtype) -> AttentionKernel | None:
        """Return attention for heads of this size over a cache of this type, or None when it cannot be had."""
        if head_size % 16 or cache_dtype not in NAMES:
            return None
        with _lock:
            key = (head_size, cache_dtype)
            if key not in self._attention:
                self._attention[key] = AttentionKernel(*key)
            return self._attention[key]


class AttentionKernel:
    """Attention of single new tokens over the cache, for one head size and cache type."""

    def __init__(self, head_size: int, cache_dtype: torch.dtype) -> None:
        from ._llvm import Compiled
        from .attention import build_attention

        kind = NAMES[cache_dtype]
        name = f"attention-{head_size}-{kind}"
        self._compiled = Compiled(name, lambda module: build_attention(module, head_size, kind), openmp_symbols())
        self._run = self._compiled.function("attend")

    def __call__(
        self, qkv: torch.Tensor, out: torch.Tensor, tokens: Tokens, keys: torch.Tensor, values: torch.Tensor,
        heads: int, cosines: torch.Tensor, sines: torch.Tensor, *, window: int | None = None,
        query_norm: torch.Tensor | None = None, key_norm: torch.Tensor | None = None, epsilon: float = 0.0,
    ) -> None:  # fmt: skip
        """Put the tokens' keys and values into the cache, and write what they see into `out`.

        `qkv` (M × (heads + 2·groups)·size) is rotated in place; `out` is M × heads·size; `keys` and `values` are
        groups × places × size; `cosines` and `sines` are positions × size/2.
        """
        self.call(
            qkv, out, tokens, keys, values, heads, cosines, sines, window=window, query_norm=query_norm,
            key_norm=key_norm, epsilon=epsilon,
        )()  # fmt: skip

    def call(
        self, qkv: torch.Tensor, out: torch.Tensor, tokens: Tokens, keys: torch.Tensor, values: torch.Tensor,
        heads: int, cosines: torch.Tensor, sines: torch.Tensor, *, window: int | None = None,
        query_norm: torch.Tensor | None = None, key_norm: torch.Tensor | None = None, epsilon: float = 0.0,
    ) -> Call:  # fmt: skip
        """Return the call that does this, for whatever tables and positions `tokens` then has."""
        groups, places, _ = keys.shape
        rows, tables, positions = tokens.addresses
        words = AttentionWords(
            qkv=qkv.data_ptr(), out=out.data_ptr(), rows=rows, tables=tables, positions=positions, tokens=len(tokens),
            keys=keys.data_ptr(), values=values.data_ptr(), places=places, heads=heads, groups=groups,
            threads=torch.get_num_threads(), cosines=cosines.data_ptr(), sines=sines.data_ptr(), window=window or 0,
            scores=tokens.scratch.data_ptr(), room=tokens.scratch.shape[1],
            query_norm=_address(query_norm), key_norm=_address(key_norm), epsilon=_bits(epsilon),
        )  # fmt: skip
        return Call(self._run, words, (qkv, out, tokens, keys, values, cosines, sines, query_norm, key_norm))


class Tokens:
    """Which rows of a product are single new tokens, which blocks their sequences hold, and at which position they are.

    `scratch` is what `room_for_scores` gave; one call at a time uses it.
    """

    def __init__(self, rows: Sequence[int], scratch: torch.Tensor) -> None:
        count = len(rows)
        self._words = (ctypes.c_int64 * (3 * count))(*rows)
        self._tables: Sequence[torch.Tensor] = ()
        self.scratch = scratch

    def __len__(self) -> int:
        return len(self._words) // 3

    def place(self, tables: Sequence[torch.Tensor], positions: Sequence[int]) -> None:
        """Say for each row its sequence's table (int64, on the CPU) and its position."""
        self._tables = tables  # alive as long as their addresses are in the words
        self._words[len(self) :] = [*(table.data_ptr() for table in tables), *positions]

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where the three lists are in memory."""
        first, step = ctypes.addressof(self._words), 8 * len(self)
        return first, first + step, first + 2 * step


def room_for_scores(longest: int) -> torch.Tensor:
    """Return scratch space for attention of tokens that see at most `longest`, themselves included."""
    return torch.empty(torch.get_num_threads(), longest + 16)


def cpu_kernels() -> CpuKernels | None:
    """Return the kernels, compiled and checked against torch on first use, or None with an event that says why."""
    if not _found:
        with _lock:
            if not _found:
                _found.append(_make())
    return _found[0]


def why_not() -> str | None:
    """Return why this machine cannot have the kernels, as far as a look at it tells; None when it can."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"this CPU's vector unit is {torch.backends.cpu.get_cpu_capability()}, and they need AVX2 on x86"
    if not openmp_symbols():
        return "torch's OpenMP runtime has no GNU entry points here"
    return None


def _make() -> CpuKernels | None:
    reason = why_not()
    if reason is None:
        try:
            kernels = CpuKernels()
            reason = _wrong(kernels)
            if reason is None:
                return kernels
        except Exception as error:  # noqa: BLE001 - whatever LLVM cannot do here, torch can do slowly
            reason = f"{type(error).__name__}: {error}"
    emit("kernels.warning", reason=reason, instead="dequantise, then torch's products")
    return None


def _wrong(kernels: CpuKernels) -> str | None:
    """Compare each product with torch on a small matrix; return what disagrees, or None."""
    from loadstone.quantization.reference import dequantize_nf4
    from loadstone.quantization.turned import turned_scales, turned_space

    def turned(plain: torch.Tensor) -> torch.Tensor:
        if not kernels.is_wide:
            return plain
        space = turned_space(len(plain), plain.shape[1], plain.dtype)
        kernels.turn(plain, space, 0)
        return space

    generator = torch.Generator().manual_seed(0)
    rows, columns = 150, 576  # more than a tile, and than a panel, and not a whole number of either
    weight = torch.randn(rows, columns, generator=generator)
    codes, absmax = torch.empty(rows, columns // 2, dtype=torch.uint8), torch.empty(rows, columns // 64)
    kernels.quantize_nf4(weight, codes, absmax)
    half = absmax.half()
    whole = (weight * 20).round().clamp(-127, 127).to(torch.int8)
    scales = torch.rand(rows, generator=generator) / 20
    kept: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = {
        "nf4": (turned(codes), turned_scales(half) if kernels.is_wide else half, dequantize_nf4(codes, half, 1.0)),
        "int8": (turned(whole), scales, whole.float() * scales[:, None]),
    }
    for dtype, name in NAMES.items():
        cast = weight.to(dtype)
        kept[name] = (cast, None, cast.float())
    for count in (7, 15):  # 4 + 2 + 1 and 8 + 4 + 2 + 1: each group of rows that there is, for few rows and for many
        x = torch.randn(count, columns, generator=generator)
        for name, (packed, more, numbers) in kept.items():
            found, expected = kernels.product(name, x, packed, more, rows=rows, columns=columns), x @ numbers.T
            if not torch.allclose(found, expected, rtol=1e-4, atol=2e-2):
                return f"the {name} product of {count} rows disagrees with torch"
    return None


def _array(words: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(words))(*words)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    (bits,) = struct.unpack("i", struct.pack("f", value))
    return int(bits)
