"""What Numba has no words for: memory at an address, and a few instructions."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, extending
from numba.np import arrayobj

from fastbn.backends.numba.compiling import F

intrinsic: Callable[[F], Any] = extending.intrinsic
_literal_intrinsic: Callable[[F], Any] = extending.intrinsic(prefer_literal=True)
_types: Any = types  # told only in part by their own types
_cgutils: Any = cgutils
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_ANYTHING = ir.IntType(8).as_pointer()
USUAL_MODE = 0x1F80
"""MXCSR of a new process: rounds to nearest, flushes nothing, traps nothing."""

# ---- Memory --------------------------------------------------------------------------------------


@intrinsic
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


@intrinsic
def part(context: Any, values: Any, start: Any, count: Any) -> Any:
    """Some values of an array, which has no owner."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(values)(context, builder, args[0]).data
        return _array(context, builder, values, builder.gep(data, [args[1]]), [args[2]])

    return values(values, types.int64, types.int64), generate


def record(dtype: np.dtype[Any]) -> Callable[[int], Any]:
    """A function that gives the record at an address."""
    result = numba.from_dtype(dtype)

    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(types.int64), generate

    found: Callable[[int], Any] = at
    return found


def _pointer(element: Any) -> Any:
    """A function that gives a pointer to nowhere, which tells a type."""
    result = _types.CPointer(element)

    @intrinsic
    def nowhere(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.get_constant_null(result)

        return result(), generate

    return nowhere


doubles, singles, octets = map(_pointer, (types.float64, types.float32, types.uint8))


@intrinsic
def size_of(context: Any, like: Any) -> Any:
    """Bytes of what the pointer `like` points at."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, like.dtype.bitwidth // 8)

    return types.int64(like), generate


# ---- Instructions --------------------------------------------------------------------------------


@intrinsic
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


@intrinsic
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


@intrinsic
def fence(context: Any) -> Any:
    """Let what was streamed be seen before whatever this thread does next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Fetch the cache line at any address, even one that is nowhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        how = [ir.Constant(_INT32, number) for number in (0, 3, 1)]  # read, to L1, data
        _call(builder, "llvm.prefetch.p0", builder.inttoptr(args[0], _ANYTHING), *how)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def whole_vectors(context: Any) -> Any:
    """Let the loops of the function that says this have vectors of 64 bytes, where there are such:
    for some processors LLVM prefers halves."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # llvmlite knows no attribute with a value, but writes whatever is in the set.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
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
