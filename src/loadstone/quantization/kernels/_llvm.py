"""Small words for writing loops in LLVM IR, and the compiler that turns them into functions.

Knows nothing of weights. All arguments of a kernel travel in one array of 64-bit words, so that a call from Python
is one ctypes call with one pointer.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from .object_cache import cached_object

I64, I32, I16, I8 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
F32, F16, VOID = ir.FloatType(), ir.HalfType(), ir.VoidType()
POINTER = I8.as_pointer()
ARGUMENTS = ir.ArrayType(I64, 0)  # as many as the kernel has names for
WORKER = ir.FunctionType(VOID, [ARGUMENTS.as_pointer()])


def vector(element: Any, length: int) -> Any:
    """Return the type of `length` elements side by side."""
    return ir.VectorType(element, length)


def constants(element: Any, values: Sequence[float]) -> Any:
    """Return a vector of constants."""
    return ir.Constant(vector(element, len(values)), [ir.Constant(element, value) for value in values])


def as_float32(value: float) -> float:
    """Round to the nearest float32, which is what a constant of that type must be."""
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def usable_features() -> Any:
    """Return the features of this processor and its system by LLVM's names; those that torch was told to leave are off.

    `ATEN_CPU_CAPABILITY=avx2` is how a user says that there shall be no AVX512 (for torch itself to say more than that
    of "default", which leaves us no kernels at all).
    """
    features = llvm.get_host_cpu_features()
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        features.update({name: False for name in features if name.startswith(("avx512", "avx10", "amx"))})
    return features


def has_features(*names: str) -> bool:
    """Tell whether all of these features can be used."""
    features = usable_features()
    return all(features.get(name, False) for name in names)


class Kernel(ir.IRBuilder):  # type: ignore[misc]
    """A function being written: llvmlite's builder with loads, stores and loops over addresses held in I64."""

    def __init__(self, module: Any, name: str, words: type[tuple[int, ...]], extra: int = 0) -> None:
        function = ir.Function(module, ir.FunctionType(VOID, [ARGUMENTS.as_pointer()] + [I64] * extra), name)
        super().__init__(function.append_basic_block())
        self.home = module
        self.arguments = function.args[0]
        self.names: tuple[str, ...] = words._fields  # type: ignore[attr-defined]
        self.extra = function.args[1:]

    def word(self, name: str) -> Any:
        """Return the word of the argument array that has this name."""
        return self.load(self.gep(self.arguments, [I32(0), I32(self.names.index(name))]))

    def words(self, *names: str) -> list[Any]:
        """Return several words."""
        return [self.word(name) for name in names]

    def float_word(self, name: str) -> Any:
        """Return a word whose low 32 bits hold a float."""
        return self.bitcast(self.trunc(self.word(name), I32), F32)

    def intrinsic(self, name: str, result: Any, *values: Any, fast: Sequence[str] = ()) -> Any:
        """Call a function of LLVM or of a library by its name."""
        function = self.home.globals.get(name)
        if function is None:
            function = ir.Function(self.home, ir.FunctionType(result, [value.type for value in values]), name)
        return self.call(function, values, fastmath=fast)

    def _place(self, base: Any, index: Any, kind: Any) -> Any:
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        place = self.gep(self.inttoptr(base, element.as_pointer()), [index])
        return self.bitcast(place, kind.as_pointer())

    def get(self, base: Any, index: Any, kind: Any) -> Any:
        """Load a value of `kind` at element `index` of the array at address `base`; no alignment is assumed."""
        loaded = self.load(self._place(base, index, kind))
        loaded.align = 1
        return loaded

    def put(self, value: Any, base: Any, index: Any) -> None:
        """Store `value` at element `index` of the array at address `base`."""
        self.store(value, self._place(base, index, value.type)).align = 1

    def get_where(self, mask: Any, base: Any, index: Any, kind: Any) -> Any:
        """Load those elements of a vector that `mask` has; the others are zero, and may lie outside memory."""
        none = constants(kind.element, [0] * kind.count)
        name = f"llvm.masked.load.v{kind.count}{kind.element.intrinsic_name}.p0"
        return self.intrinsic(name, kind, self._place(base, index, kind), I32(1), mask, none)

    def put_where(self, mask: Any, value: Any, base: Any, index: Any) -> None:
        """Store those elements of a vector that `mask` has."""
        name = f"llvm.masked.store.v{value.type.count}{value.type.element.intrinsic_name}.p0"
        self.intrinsic(name, VOID, value, self._place(base, index, value.type), I32(1), mask)

    def prefetch(self, address: Any) -> None:
        """Ask for the line at an address to be brought into the second cache; nothing need be there."""
        self.intrinsic("llvm.prefetch.p0", VOID, self.inttoptr(address, POINTER), I32(0), I32(2), I32(1))

    def pick(self, first: Any, second: Any, order: Sequence[int]) -> Any:
        """Return the elements of two vectors in the given order."""
        return self.shuffle_vector(first, second, constants(I32, order))

    def beside(self, values: Sequence[Any]) -> Any:
        """Return a vector of single values."""
        found = ir.Constant(vector(values[0].type, len(values)), ir.Undefined)
        for place, value in enumerate(values):
            found = self.insert_element(found, value, I32(place))
        return found

    def space(self, size: int) -> Any:
        """Return the address of `size` bytes that are this call's own, at the beginning of a cache line."""
        place = self.alloca(ir.ArrayType(I8, size))
        place.align = 64
        return self.ptrtoint(place, I64)

    def splat(self, value: Any, length: int) -> Any:
        """Return `value` in every element of a vector."""
        nothing = ir.Constant(vector(value.type, length), ir.Undefined)
        one = self.insert_element(nothing, value, I32(0))
        return self.shuffle_vector(one, nothing, constants(I32, [0] * length))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a·b + c, rounded once."""
        return self.intrinsic(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def sum(self, value: Any) -> Any:
        """Return the sum of a vector of floats, in a tree's order."""
        name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
        return self.intrinsic(name, F32, F32(0.0), value, fast=("reassoc",))

    def largest(self, magnitudes: Any) -> Any:
        """Return the largest of floats that are not negative: they order as their bits do, and NaN above all."""
        count = magnitudes.type.count
        bits = self.bitcast(magnitudes, vector(I32, count))
        return self.bitcast(self.intrinsic(f"llvm.vector.reduce.umax.v{count}i32", I32, bits), F32)

    def magnitude(self, value: Any) -> Any:
        """Return the absolute values of a vector of floats."""
        return self.intrinsic(f"llvm.fabs.v{value.type.count}f32", value.type, value)

    def exponential(self, value: Any) -> Any:
        """Return e to each element of a vector of floats, to about two units in the last place.

        2ⁿ·2ᶠ with n whole goes into the exponent's bits, and 2ᶠ for f in [-½, ½] is a polynomial (Taylor's series
        of eˣ to the seventh power). Below -87 the result is the smallest normal number, above 88 about 1.7e38.
        """
        kind, count = value.type, value.type.count
        low, high = constants(F32, [-87.0] * count), constants(F32, [88.0] * count)
        value = self.select(self.fcmp_ordered("<", value, low), low, value)
        value = self.select(self.fcmp_ordered(">", value, high), high, value)
        power = self.fmul(value, constants(F32, [as_float32(math.log2(math.e))] * count))
        whole = self.intrinsic(f"llvm.rint.v{count}f32", kind, power)
        # The fraction is taken in base e, in two parts, so that its error does not grow with the whole.
        part = self.fma(whole, constants(F32, [-0.693359375] * count), value)
        part = self.fma(whole, constants(F32, [as_float32(0.693359375 - math.log(2))] * count), part)
        total = constants(F32, [as_float32(1 / math.factorial(7))] * count)
        for order in range(6, -1, -1):
            total = self.fma(total, part, constants(F32, [as_float32(1 / math.factorial(order))] * count))
        bits = self.shl(self.fptosi(whole, vector(I32, count)), constants(I32, [23] * count))
        return self.bitcast(self.add(self.bitcast(total, vector(I32, count)), bits), kind)

    def least(self, a: Any, b: Any) -> Any:
        """Return the smaller of two signed integers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def share(self, count: Any, grain: int = 1) -> tuple[Any, Any]:
        """Return the part [start, stop) of `count` items, in multiples of `grain`, that the running thread is to do."""
        thread = self.sext(self.intrinsic("omp_get_thread_num", I32), I64)
        threads = self.sext(self.intrinsic("omp_get_num_threads", I32), I64)
        grains = self.udiv(self.add(count, I64(grain - 1)), I64(grain))
        start = self.mul(self.udiv(self.mul(grains, thread), threads), I64(grain))
        stop = self.mul(self.udiv(self.mul(grains, self.add(thread, I64(1))), threads), I64(grain))
        return start, self.least(stop, count)

    def loop(
        self, start: Any, stop: Any, step: int, body: Callable[..., Sequence[Any] | None], *carried: Any
    ) -> list[Any]:
        """Write `for i in range(start, stop, step)`: `body(i, *carried)` returns the carried values' next ones."""
        before = self.block
        head, inside, after = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(I64)
        index.add_incoming(start, before)
        values = []
        for value in carried:
            values.append(self.phi(value.type))
            values[-1].add_incoming(value, before)
        self.cbranch(self.icmp_signed("<", index, stop), inside, after)
        self.position_at_end(inside)
        following = body(index, *values) or ()
        index.add_incoming(self.add(index, I64(step)), self.block)
        for value, new in zip(values, following, strict=True):
            value.add_incoming(new, self.block)
        self.branch(head)
        self.position_at_end(after)
        return values

    def in_parallel(self, worker: Any) -> None:
        """Run `worker` on all threads with the same arguments, and wait for them."""
        self.intrinsic(
            "GOMP_parallel", VOID,
            self.bitcast(worker, POINTER), self.bitcast(self.arguments, POINTER),
            self.trunc(self.word("threads"), I32), I32(0),
        )  # fmt: skip

    def done(self) -> Any:
        """End the function and return it."""
        self.ret_void()
        return self.function


class Compiled:
    """Machine code for this processor, kept alive as long as this object.

    `write` adds functions to an empty module; it is called only when the code called `name` is not on disk.
    `symbols` are the addresses of the library functions that the code calls.
    """

    _lock = threading.Lock()

    def __init__(self, name: str, write: Callable[[Any], None], symbols: dict[str, int]) -> None:
        with self._lock:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            for symbol, address in symbols.items():
                llvm.add_symbol(symbol, address)
            triple, cpu = llvm.get_process_triple(), llvm.get_host_cpu_name()
            features = usable_features().flatten()
            machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, cpu=cpu, features=features, jit=True)
            versions = (llvmlite.__version__, *map(str, llvm.llvm_version_info))
            code = cached_object(name, (*versions, triple, cpu, features), lambda: _compile(write, machine))
            self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
            self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            self._engine.finalize_object()

    def function(self, name: str) -> Callable[[Any], None]:
        """Return a function that takes the argument array; the GIL is free while it runs."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        return kind(self._engine.get_function_address(name))


def _compile(write: Callable[[Any], None], machine: Any) -> bytes:
    module = ir.Module("loadstone")
    module.triple = machine.triple
    write(module)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    code: bytes = machine.emit_object(parsed)
    return code
