"""What Numba has no words for: memory at an address, a few instructions, and half types.

float16 and bfloat16 are in memory alone. `wide` and `narrow` convert them, float16 by the processor
where it can, else by integer operations, which LLVM makes vectors of.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, extending
from numba.np import arrayobj

from fastbn.backends.numba.compiling import BRAIN, HALF, F

_intrinsic: Callable[[F], Any] = extending.intrinsic
_literal_intrinsic: Callable[[F], Any] = extending.intrinsic(prefer_literal=True)
_types: Any = types  # told only in part by their own types
_cgutils: Any = cgutils
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_ANYTHING = ir.IntType(8).as_pointer()
USUAL_MODE = 0x1F80
"""MXCSR of a new process: rounds to nearest, flushes nothing, traps nothing."""

# ---- Memory --------------------------------------------------------------------------------------


@_intrinsic
def array(context: Any, address: Any, shape: Any, like: Any) -> Any:
    """The dense array of a shape at an address, of what the pointer `like` points at."""
    result = types.Array(like.dtype, len(shape), "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], context.get_data_type(like.dtype).as_pointer())
        shape = [builder.extract_value(args[1], i) for i in range(result.ndim)]
        return _array(context, builder, result, pointer, shape)

    return result(types.int64, _types.UniTuple(types.int64, len(shape)), like), generate


def _array(context: Any, builder: Any, kind: Any, pointer: Any, shape: list[Any]) -> Any:
    size = context.get_constant(types.intp, kind.dtype.bitwidth // 8)
    strides = [size]
    for extent in shape[:0:-1]:
        strides.insert(0, builder.mul(strides[0], extent))
    a = context.make_array(kind)(context, builder)
    arrayobj.populate_array(a, pointer, shape, strides, size, None)  # type: ignore[no-untyped-call]
    return a._getvalue()


@_literal_intrinsic
def local(context: Any, count: Any, like: Any) -> Any:
    """An array on the stack, of a constant size: LLVM knows that nothing else lies there."""
    result = types.Array(like.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.get_data_type(like.dtype)
        room = _cgutils.alloca_once(builder, ir.ArrayType(data, count.literal_value))
        room.align = 64
        pointer = builder.bitcast(room, data.as_pointer())
        return _array(context, builder, result, pointer, [_INT64(count.literal_value)])

    return result(count, like), generate


@_intrinsic
def part(context: Any, values: Any, start: Any, count: Any) -> Any:
    """Some values of an array, which has no owner."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(values)(context, builder, args[0]).data
        return _array(context, builder, values, builder.gep(data, [args[1]]), [args[2]])

    return values(values, types.int64, types.int64), generate


def record(dtype: np.dtype[Any]) -> Callable[[int], Any]:
    """A function that gives the record at an address."""
    result = numba.from_dtype(dtype)

    @_intrinsic
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    found: Callable[[int], Any] = at
    return found


def _pointer(element: Any) -> Any:
    """A function that gives a pointer to nowhere, which tells a type."""
    result = _types.CPointer(element)

    @_intrinsic
    def nowhere(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.get_constant_null(result)

        return result(), generate

    return nowhere


doubles, singles, octets = map(_pointer, (types.float64, types.float32, types.uint8))


@_intrinsic
def size_of(context: Any, like: Any) -> Any:
    """Bytes of what the pointer `like` points at."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, like.dtype.bitwidth // 8)

    return types.int64(like), generate


# ---- Instructions --------------------------------------------------------------------------------


@_intrinsic
def invoke(context: Any, body: Any, job: Any, run: Any, c0: Any, c1: Any, index: Any) -> Any:
    """Call a body by its address; a record of the last four numbers lies on the stack meanwhile."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        unit = _cgutils.alloca_once(builder, ir.ArrayType(_INT64, 4))
        for i, number in enumerate(args[2:]):
            builder.store(number, _cgutils.gep_inbounds(builder, unit, 0, i))
        kind = ir.FunctionType(_INT64, [_INT64, _INT64, *[_ANYTHING] * 4])
        given = args[1], builder.ptrtoint(unit, _INT64), *[ir.Constant(_ANYTHING, None)] * 4
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)

    return types.int64(*[types.int64] * 6), generate


def _call(builder: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(known, args)


@_intrinsic
def stream_line(context: Any, to: Any, values: Any, start: Any) -> Any:
    """Write a cache line past the caches, of an array's values from one on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_INT32, 16).as_pointer()
        data = context.make_array(values)(context, builder, args[1]).data
        source = builder.bitcast(builder.gep(data, [args[2]]), kind)
        line = builder.load(source, align=values.dtype.bitwidth // 8)
        store = builder.store(line, builder.inttoptr(args[0], kind), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, values, types.int64), generate


@_intrinsic
def fence(context: Any) -> Any:
    """Let what was streamed be seen before whatever this thread does next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Fetch the cache line at any address, even one that is nowhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        how = [ir.Constant(_INT32, number) for number in (0, 3, 1)]  # read, to L1, data
        _call(builder, "llvm.prefetch.p0", builder.inttoptr(args[0], _ANYTHING), *how)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def whole_vectors(context: Any) -> Any:
    """Let the loops of the function that says this have vectors of 64 bytes, where there are such:
    for some processors LLVM prefers halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite knows no attribute with a value, but writes whatever is in the set.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def set_mode(context: Any, word: Any) -> Any:
    """The thread's floating-point mode, which becomes `word`; on x86 alone, others keep theirs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() != "x86_64":
            return args[0]
        old, new = (builder.alloca(_INT32) for _ in range(2))
        builder.store(builder.trunc(args[0], _INT32), new)
        for name, place in (("stmxcsr", old), ("ldmxcsr", new)):
            _call(builder, "llvm.x86.sse." + name, builder.bitcast(place, _ANYTHING))
        return builder.zext(builder.load(old), _INT64)

    return types.int64(types.int64), generate


# ---- Element types -------------------------------------------------------------------------------


@_intrinsic
def _bits(context: Any, value: Any, like: Any) -> Any:
    """The last bits of a value, as many as the type of `like` has, as that type."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        result, bits = context.get_value_type(like), ir.IntType(like.bitwidth)
        number = args[0]
        if isinstance(number.type, ir.IntType) and number.type != bits:
            number = builder.trunc(number, bits)
        return builder.bitcast(number, result)

    return like(value, like), generate


_CONVERTS = bool(binding.get_host_cpu_features().get("f16c"))
"""Whether the processor converts float16; else integer operations do."""


@_intrinsic
def _from_half(context: Any, value: Any) -> Any:
    """The float32 of float16's bits, by the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(HALF), generate


@_intrinsic
def _to_half(context: Any, value: Any) -> Any:
    """The bits of the float16 nearest to a float32, by the processor."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return HALF(types.float32), generate


def wide(value: Any) -> Any:
    """A value of any element type in float64: exactly."""


@extending.overload(wide, strict=False)
def _wide(value: Any) -> Any:
    if value == BRAIN:
        return lambda value: np.float64(_bits((value & 0xFFFF) << 16, np.float32(0)))
    if value == HALF and _CONVERTS:
        return lambda value: np.float64(_from_half(value))
    return _wide_half if value == HALF else lambda value: np.float64(value)


def _wide_half(value: Any) -> Any:
    # The exponents are 1008 apart: a power of two is exact, for numbers below the normal ones too.
    size = np.int64(value & 0x7FFF)
    number = _bits(size << 42, 0.0) * 2.0**1008
    number = number if size < 0x7C00 else _bits(size << 42 | 0x7FF << 52, 0.0)
    return -number if value & 0x8000 else number


def single(value: Any) -> Any:
    """A value of any element type but float64 in float32: exactly."""


@extending.overload(single, strict=False)
def _single(value: Any) -> Any:
    return lambda value: np.float32(wide(value))


def narrow(value: Any, like: Any) -> Any:
    """A number as an element like another: the nearest, and of two the even one; a half by way of
    float32."""


@extending.overload(narrow, strict=False)
def _narrow(value: Any, like: Any) -> Any:
    if like == BRAIN:
        return _narrow_brain
    if like == HALF and _CONVERTS:
        return lambda value, like: _to_half(np.float32(value))
    if like == HALF:
        return _narrow_half
    return lambda value, like: type(like)(value)


def _narrow_brain(value: Any, like: Any) -> Any:
    bits = np.int64(_bits(np.float32(value), np.uint32(0)))
    rounded = bits + 0x7FFF + (bits >> 16 & 1)
    return np.int16((rounded if value == value else bits | 0x400000) >> 16)


def _narrow_half(value: Any, like: Any) -> Any:
    bits = np.int64(_bits(np.float32(value), np.uint32(0)))
    size = bits & 0x7FFFFFFF
    normal = size - (112 << 23) + 0xFFF + (size >> 13 & 1) >> 13
    # Below the normal numbers, 1/2 is added: its last bits are those that float16 keeps.
    tiny = np.int64(_bits(_bits(size, np.float32(0)) + np.float32(0.5), np.uint32(0))) - (126 << 23)
    half: Any = normal if size >= 113 << 23 else tiny
    half = half if size < 143 << 23 else 0x7C00
    return np.uint16((half if value == value else 0x7E00) | bits >> 16 & 0x8000)
