"""The Numba backend: the passes and trips, compiled when first used.

1. A call is a *job*, a record that `_plan` fills in. Two families of loops work on it. *Planes*
   (channels outside): a channel is N rows of S contiguous values. *Rows* (channels inside): a row
   holds all channels, and every column has its own sums. Rows of few values are folded, several
   samples to a row; tiny planes are rows of C * S columns.
2. Each part of a job (the sums of a chunk, the small step, the writing of a chunk) is a *body*,
   compiled once for each element type and called by its address. `_run` brings them in order: it
   takes blocks of channels through a whole trip, where what was read last is written first, for
   it is still in the cache, or shares the chunks of all channels among the threads.
3. Sums are float64, in `LANES` lanes: values at the same place of a row go to the same lane. The
   values are cut into chunks by shape and element type alone, and sums of chunks are added in
   order. So the bits do not depend on threads, strides or alignment, and a trip gives the bits of
   its passes.
4. Moments are taken about a shift, at first the channel's first value: a constant channel gives a
   variance of exactly 0, and a large mean costs no digits. Where the shift lay far from the mean
   (an outlier came first), or float64 squares overflow, the channel is summed again about the mean
   just found (Chan, Golub & LeVeque 1983).
5. Elementwise work is done in the element type, in float32 for halves, with `_coefficients` that
   keep the digits of the mean and the range of float32.
6. A reduction in plain Python loops stays scalar unless the compiler may reorder it. So a value of
   type `Lanes` is one LLVM vector, spelled out below: the order is the program's, and every
   instruction set splits it into its registers.
7. `_run` is compiled twice, serial and parallel. Numba's "workqueue" threads end the process when
   entered twice at once, so one call at a time is parallel and the others run serial meanwhile.
8. A tail (activation and residual) or a gate (the activation's gradient) is computed in the same
   walk, by bodies of their own: None in place of one leaves no trace in the others. In sums a gate
   multiplies in float64. What a gate lets through is streamed where it lies in its cache lines as
   dx does, and stored elsewhere.
9. float16 and bfloat16 are in memory alone: loads make float32 of them and stores round to them, by
   integer operations, for not every processor has others. Kernels see them as integers of 16 bits,
   unsigned and signed, whose types tell which is which.
10. The plain entries take contiguous arrays that fit past all checks: those cost 20 to 30 us a
   call, more than some 1 MB of work. They answer None, having touched nothing, for everything else.
11. A selection, too, has bodies of its own. Its mask is read as bytes, sixteen *picks* at a time;
    where they are 0, what was loaded becomes 0 before it is added, and what is stored is 0. In rows
    tables tell each column's place in the mask, and its sample: where samples of sixteen columns do
    not weigh alike, each lane has a weight of its own. Mask and weights are read where they lie; a
    vector that reaches past their end is read from a copy of the end.
"""

from __future__ import annotations

import importlib
import math
import operator
import os
import platform
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from llvmlite import binding, ir
from numba import prange, types
from numba.core import caching, ccallback, extending
from numba.np.ufunc import parallel as threading_layers

from fastbn._caches import (
    FETCH,
    L2,
    LOOKAHEAD,
    MOST_FOLDED,
    SERIAL_BELOW,
    SPARSE,
    STREAM_MAPS,
    STREAM_PLANES,
    STREAM_ROWS,
    STRETCH,
    TRIP,
    scratch,
)
from fastbn.activations import LINEAR, Activation, of
from fastbn.backends.base import (
    Affine,
    Array,
    Backend,
    Gate,
    GradientCoefficients,
    Selection,
    Table,
    Tail,
    depth,
    inverse_deviation,
    quiet,
)
from fastbn.elements import SINGLE, arithmetic, is_bfloat16
from fastbn.errors import BackendError
from fastbn.layouts import SHORT, reshaped

LANES = 16
"""Values in one `Lanes`: a cache line of float32."""
CHUNK = 16384
"""Values of a channel whose sums are kept apart before they are added."""
FOLD_BELOW = 64
"""Columns; narrower rows are taken several at a time,"""
MANY = 1 << 16
"""and in arrays of this many values all rows of broken lanes, up to `MOST_FOLDED` together."""
AHEAD = 1024
"""Values from one to the one that is fetched meanwhile."""
JOINED = 1024
"""Values: planes up to this size are streamed several at a time."""
BUFFER = 2 * JOINED + LANES
"""Values that wait to be streamed, at most."""
STREAMED_ROW = 1 << 10
"""Bytes from which a row's unaligned ends do not matter to streaming."""
USUAL_MODE = 0x1F80
"""MXCSR of a new process: rounds to nearest, flushes nothing, traps nothing."""
POOLED = 80
"""Bytes of tables for a channel between two passes, where channels are pooled."""
FEW = 1024
"""Channels whose small step is no work for several threads."""

NOTHING, MOMENTS, GRADIENTS = 0, 1, 2  # what is summed
AFFINE, GRADIENT = 1, 2  # what is written: (source - mean) * scale + beta, or dx
NOT, STORED, AS_OUT = 0, 1, 2  # how the gated dy is written; as out is, perhaps past the caches
TABLE = 6
GAMMA, BETA, MEAN, VAR, DBETA, REST = range(TABLE)  # rows of a call's table
DGAMMA = BETA
DY_MEAN = DBETA

F = TypeVar("F", bound=Callable[..., Any])
_numba: Any = numba  # its types are told only in part

if _numba.config.DISABLE_JIT:
    raise BackendError("NUMBA_DISABLE_JIT is set, so nothing would be compiled; unset it")

# ---- Lanes: one LLVM vector of LANES values ------------------------------------------------------

_intrinsic: Callable[[F], Any] = extending.intrinsic
_LARGEST = float(np.finfo(np.float32).max)
_INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT32, _FLOAT64 = ir.FloatType(), ir.DoubleType()
_HALF, _BRAIN = types.uint16, types.int16
"""Elements are told by the type of a value; these stand for float16 and bfloat16."""


class Lanes(types.Type):
    """Numba's type of a vector of LANES values: float32 or float64, in which work is done; or
    picks, bytes that are not 0 where a place counts."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


class _LanesModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(lanes.element))  # type: ignore[no-untyped-call]


extending.register_model(Lanes)(_LanesModel)
_DOUBLES, _PICKS = Lanes(types.float64), Lanes(types.uint8)


def _vector(element: Any) -> ir.VectorType:
    """LANES values as they are worked on."""
    if element == types.uint8:
        return ir.VectorType(_INT8, LANES)
    return ir.VectorType(_FLOAT64 if element == types.float64 else _FLOAT32, LANES)


def _memory(element: Any) -> ir.VectorType:
    """LANES values as memory has them."""
    return ir.VectorType(_INT16, LANES) if _is_half(element) else _vector(element)


def _is_half(element: Any) -> bool:
    return element in (_HALF, _BRAIN)


def _lanes(element: Any) -> Lanes:
    return Lanes(types.float64 if element == types.float64 else types.float32)


def _define(op: Callable[..., Any], instruction: str) -> None:
    """Give two lanes of the same type an operator."""

    def typer(context: Any) -> Callable[..., Any]:
        return lambda a, b: a if isinstance(a, Lanes) and a == b else None

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)

    extending.type_callable(op)(typer)
    extending.lower_builtin(op, Lanes, Lanes)(lower)  # type: ignore[no-untyped-call]


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
_define(operator.truediv, "fdiv")


def _indices(start: int, count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT32, count), list(range(start, start + count)))


_HALVES = _indices(0, LANES // 2), _indices(LANES // 2, LANES // 2)
"""The lanes of each half."""


def _splat(builder: Any, value: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_INT32, 0))
    zeros = ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, nothing, zeros)


def _mask(builder: Any, count: Any) -> Any:
    """Which lanes are among the first `count`; only ever asked for counts below LANES."""
    return builder.icmp_signed("<", _indices(0, LANES), _splat(builder, count))


def _masked(builder: Any, verb: str, result: Any, args: list[Any], data: Any) -> Any:
    """Call LLVM's masked load or store of `data`'s type."""
    scalar = {_INT16: "i16", _FLOAT32: "f32", _FLOAT64: "f64"}[data.element]
    name = f"llvm.masked.{verb}.v{LANES}{scalar}.p0"
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(known or ir.Function(builder.module, kind, name), args)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, _memory(element).as_pointer())


def _scalar(builder: Any, address: Any, element: Any) -> Any:
    """One value as memory has it."""
    pointer = builder.inttoptr(address, _memory(element).element.as_pointer())
    return builder.load(pointer, align=element.bitwidth // 8)


def _bits(number: int) -> ir.Constant:
    """The same 32 bits in every lane."""
    return ir.Constant(ir.VectorType(_INT32, LANES), [number] * LANES)


def _float(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _vector(types.float32))


def _from_memory(builder: Any, data: Any, element: Any) -> Any:
    """What was loaded, in the type of work; every half is a float32."""
    if not _is_half(element):
        return data
    bits = builder.zext(data, ir.VectorType(_INT32, LANES))
    if element == _BRAIN:
        return _float(builder, builder.shl(bits, _bits(16)))
    return _float(builder, _single_bits(builder, bits))


def _single_bits(builder: Any, bits: Any) -> Any:
    """Float16's bits as float32's: the exponents are 112 apart."""
    size = builder.and_(bits, _bits(0x7FFF))
    moved = builder.shl(size, _bits(13))
    normal = builder.add(moved, _bits(112 << 23))
    # Below the normal numbers: put behind 2**-14, which is then subtracted.
    behind = _float(builder, builder.or_(moved, _bits(113 << 23)))
    tiny = builder.fsub(behind, ir.Constant(behind.type, [2.0**-14] * LANES))
    tiny = builder.bitcast(tiny, bits.type)
    special = builder.or_(moved, _bits(0xFF << 23))
    finite = builder.icmp_signed("<", size, _bits(0x7C00))
    small = builder.icmp_signed("<", size, _bits(0x0400))
    number = builder.select(finite, builder.select(small, tiny, normal), special)
    return builder.or_(number, builder.shl(builder.xor(bits, size), _bits(16)))


def _to_memory(builder: Any, value: Any, element: Any) -> Any:
    """What will be stored: float32 rounds to the nearest half, and of two to the even one."""
    if not _is_half(element):
        return value
    bits = builder.bitcast(value, ir.VectorType(_INT32, LANES))
    size = builder.and_(bits, _bits(0x7FFFFFFF))
    is_nan = builder.icmp_signed(">", size, _bits(0xFF << 23))
    round_bits = _brain_bits if element == _BRAIN else _half_bits
    number, nan = round_bits(builder, size)
    number = builder.select(is_nan, nan, number)
    sign = builder.lshr(builder.xor(bits, size), _bits(16))
    return builder.trunc(builder.or_(number, sign), _memory(element))


def _rounded_up(builder: Any, size: Any, dropped: int, offset: int) -> Any:
    """The bits without their last `dropped`, to the nearest; plus an offset before."""
    last = builder.and_(builder.lshr(size, _bits(dropped)), _bits(1))
    nearly_half = (1 << dropped - 1) - 1
    up = builder.add(builder.add(size, _bits((offset + nearly_half) & 0xFFFFFFFF)), last)
    return builder.lshr(up, _bits(dropped))


def _brain_bits(builder: Any, size: Any) -> tuple[Any, Any]:
    """Float32's bits without sign as bfloat16's, and a NaN."""
    return _rounded_up(builder, size, 16, 0), _bits(0x7FC0)


def _half_bits(builder: Any, size: Any) -> tuple[Any, Any]:
    """Float32's bits without sign as float16's, and a NaN."""
    normal = _rounded_up(builder, size, 13, -112 << 23)
    # Below the normal numbers: added to 0.5, whose last place is the smallest half's.
    tiny = builder.fadd(_float(builder, size), ir.Constant(_vector(types.float32), [0.5] * LANES))
    tiny = builder.sub(builder.bitcast(tiny, size.type), _bits(126 << 23))
    finite = builder.icmp_signed("<", size, _bits(143 << 23))
    small = builder.icmp_signed("<", size, _bits(113 << 23))
    number = builder.select(finite, builder.select(small, tiny, normal), _bits(0x7C00))
    return number, _bits(0x7E00)


@_intrinsic
def _itemsize(context: Any, element: Any) -> Any:
    """Bytes of one value in memory."""
    size = ir.Constant(_INT64, element.bitwidth // 8)
    return types.int64(element), lambda context, builder, signature, args: size


@_intrinsic
def _worksize(context: Any, element: Any) -> Any:
    """Bytes of one value as it is worked on, and of coefficients."""
    size = ir.Constant(_INT64, _lanes(element).element.bitwidth // 8)
    return types.int64(element), lambda context, builder, signature, args: size


@_intrinsic
def _narrow(context: Any, value: Any, element: Any) -> Any:
    """Float64 lanes, rounded to the type in which `element` is worked on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        same = element == types.float64
        return args[0] if same else builder.fptrunc(args[0], _vector(element))

    return _lanes(element)(_DOUBLES, element), generate


@_intrinsic
def _spread(context: Any, value: Any) -> Any:
    """A float64 in every lane."""
    return _DOUBLES(types.float64), lambda context, builder, signature, args: _splat(
        builder, args[0]
    )


@_intrinsic
def _value(context: Any, address: Any, element: Any) -> Any:
    """The value at an address, in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _from_memory(builder, _splat(builder, _scalar(builder, args[0], element)), element)
        value = builder.extract_element(values, ir.Constant(_INT32, 0))
        return context.cast(builder, value, _lanes(element).element, types.float64)

    return types.float64(types.int64, element), generate


@_intrinsic
def _set_value(context: Any, address: Any, value: Any, element: Any) -> Any:
    """The float64 `value`, rounded to a float `element`, to an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = context.cast(builder, args[1], types.float64, element)
        pointer = builder.inttoptr(args[0], _vector(element).element.as_pointer())
        builder.store(value, pointer, align=element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float64, element), generate


@_intrinsic
def _eight(context: Any, address: Any, pitch: Any, single: Any, element: Any) -> Any:
    """Eight lanes of coefficients that lie `pitch` bytes apart; each full of one value if `single`
    is not None."""
    kind = _lanes(element)
    lines = _numba.types.UniTuple(kind, 8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = []
        for i in range(8):
            at = builder.add(args[0], builder.mul(args[1], ir.Constant(_INT64, i)))
            if single == types.none:
                pointer = _pointer(builder, at, kind.element)
                lanes.append(builder.load(pointer, align=kind.element.bitwidth // 8))
            else:
                lanes.append(_splat(builder, _scalar(builder, at, kind.element)))
        return context.make_tuple(builder, lines, lanes)

    return lines(types.int64, types.int64, single, element), generate


@_intrinsic
def _load(context: Any, address: Any, element: Any) -> Any:
    """LANES values from memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], element)
        data = builder.load(pointer, align=element.bitwidth // 8)
        return _from_memory(builder, data, element)

    return _lanes(element)(types.int64, element), generate


def _load_first(builder: Any, address: Any, count: Any, element: Any) -> Any:
    """`count` < LANES values as memory has them, and zeros."""
    data = _memory(element)
    mask = _mask(builder, builder.trunc(count, _INT32))
    align = ir.Constant(_INT32, element.bitwidth // 8)
    zeros = ir.Constant(data, [0 if _is_half(element) else 0.0] * LANES)
    args = [_pointer(builder, address, element), align, mask, zeros]
    return _masked(builder, "load", data, args, data)


def _store_first(builder: Any, address: Any, data: Any, count: Any, element: Any) -> None:
    """The first `count` < LANES values to memory."""
    mask = _mask(builder, builder.trunc(count, _INT32))
    align = ir.Constant(_INT32, element.bitwidth // 8)
    args = [data, _pointer(builder, address, element), align, mask]
    _masked(builder, "store", ir.VoidType(), args, data.type)


def _store_past(builder: Any, address: Any, data: Any, element: Any) -> None:
    """LANES values to memory past the cache."""
    align = min(64, LANES * element.bitwidth // 8)
    store = builder.store(data, _pointer(builder, address, element), align=align)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))


@_intrinsic
def _load_some(context: Any, address: Any, count: Any, element: Any) -> Any:
    """`count` < LANES values from memory, and zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _from_memory(builder, _load_first(builder, args[0], args[1], element), element)

    return _lanes(element)(types.int64, types.int64, element), generate


@_intrinsic
def _store(context: Any, address: Any, value: Any, element: Any) -> Any:
    """All lanes to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _to_memory(builder, args[1], element)
        builder.store(data, _pointer(builder, args[0], element), align=element.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes(element), element), generate


@_intrinsic
def _stream(context: Any, address: Any, value: Any, element: Any) -> Any:
    """All lanes to memory past the cache; the address is as `_head` makes it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store_past(builder, args[0], _to_memory(builder, args[1], element), element)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes(element), element), generate


@_intrinsic
def _store_some(context: Any, address: Any, value: Any, count: Any, element: Any) -> Any:
    """The first `count` < LANES lanes to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _to_memory(builder, args[1], element)
        _store_first(builder, args[0], data, args[2], element)
        return context.get_dummy_value()

    return types.void(types.int64, _lanes(element), types.int64, element), generate


@_intrinsic
def _copy(context: Any, to: Any, values: Any, stream: Any, element: Any) -> Any:
    """LANES values from memory to memory as they are; past the cache if `stream` is not None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = element.bitwidth // 8
        data = builder.load(_pointer(builder, args[1], element), align=size)
        if stream == types.none:
            builder.store(data, _pointer(builder, args[0], element), align=size)
        else:
            _store_past(builder, args[0], data, element)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, stream, element), generate


@_intrinsic
def _copy_some(context: Any, to: Any, values: Any, count: Any, element: Any) -> Any:
    """`count` < LANES values from memory to memory as they are."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _load_first(builder, args[1], args[2], element)
        _store_first(builder, args[0], data, args[2], element)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, element), generate


@_intrinsic
def _widen(context: Any, value: Any) -> Any:
    """The lanes in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value == _DOUBLES else builder.fpext(args[0], _vector(types.float64))

    return _DOUBLES(value), generate


@_intrinsic
def _keep(context: Any, value: Any, count: Any) -> Any:
    """Float64 lanes with zeros after the first `count` < LANES."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _mask(builder, builder.trunc(args[1], _INT32))
        zeros = ir.Constant(_vector(types.float64), [0.0] * LANES)
        return builder.select(mask, args[0], zeros)

    return _DOUBLES(_DOUBLES, types.int64), generate


@_intrinsic
def _rescale(context: Any, value: Any, unit: Any, element: Any) -> Any:
    """value * unit; only float64 values have squares that overflow: for others unit is 1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], args[1]) if element == types.float64 else args[0]

    return _DOUBLES(_DOUBLES, _DOUBLES, element), generate


@_intrinsic
def _total(context: Any, value: Any) -> Any:
    """The sum of float64 lanes: the upper half is added to the lower until one is left."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (lanes,) = args
        half = LANES
        while half > 1:
            half //= 2
            lower = builder.shuffle_vector(lanes, lanes, _indices(0, half))
            upper = builder.shuffle_vector(lanes, lanes, _indices(half, half))
            lanes = builder.fadd(lower, upper)
        return builder.extract_element(lanes, ir.Constant(_INT32, 0))

    return types.float64(_DOUBLES), generate


@_intrinsic
def _fence(context: Any) -> Any:
    """Let what `_stream` wrote be seen before whatever this thread does next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def _mode(context: Any, word: Any) -> Any:
    """The thread's floating-point mode, which becomes `word`; on x86 alone, others keep theirs.

    A thread of the team has the mode of whoever called first, and the caller may have another by
    now: kernels run in the usual one, in which nothing is flushed.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() != "x86_64":
            return args[0]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        old, new = (builder.alloca(_INT32) for _ in range(2))
        builder.store(builder.trunc(args[0], _INT32), new)
        for name, place in (("stmxcsr", old), ("ldmxcsr", new)):
            name = "llvm.x86.sse." + name
            known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(known, [builder.bitcast(place, ir.IntType(8).as_pointer())])
        return builder.zext(builder.load(old), ir.IntType(64))

    return types.int64(types.int64), generate


@_intrinsic
def _prefetch(context: Any, address: Any) -> Any:
    """Fetch the cache line at any address, even one that is nowhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        name = "llvm.prefetch.p0"
        known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        how = [ir.Constant(_INT32, number) for number in (0, 2, 1)]  # read, to L2, data
        builder.call(known, [builder.inttoptr(args[0], pointer), *how])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def _take(context: Any, address: Any) -> Any:
    """Count up the integer at an address, which threads share; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(_INT64, 1), "monotonic")

    return types.int64(types.int64), generate


@_intrinsic
def _integer(context: Any, address: Any) -> Any:
    """The integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _INT64.as_pointer()))

    return types.int64(types.int64), generate


@_intrinsic
def _doubles(context: Any, address: Any) -> Any:
    """A pointer to float64."""
    return _typed(_numba.types.CPointer(types.float64), address)


@_intrinsic
def _jobs(context: Any, address: Any) -> Any:
    """A pointer to a `_JOB`."""
    return _typed(_numba.types.CPointer(_numba.from_dtype(_JOB)), address)


def _typed(pointer: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64), generate


@_intrinsic
def _invoke(
    context: Any, body: Any, job: Any, run: Any, c0: Any, c1: Any, index: Any, ahead: Any
) -> Any:
    """Call a body by its address: what is called so is compiled once, and apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64] * 6)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


def _of_doubles(name: str) -> Callable[..., Any]:
    """One of LLVM's functions on each float64 lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = _vector(types.float64)
        full = f"llvm.{name}.v{LANES}f64"
        known = builder.module.globals.get(full)
        kind = ir.FunctionType(lanes, [lanes])
        return builder.call(known or ir.Function(builder.module, kind, full), args)

    return generate


@_intrinsic
def _root(context: Any, value: Any) -> Any:
    return _DOUBLES(_DOUBLES), _of_doubles("sqrt")


@_intrinsic
def _absolute(context: Any, value: Any) -> Any:
    return _DOUBLES(_DOUBLES), _of_doubles("fabs")


@_intrinsic
def _exponent(context: Any, value: Any) -> Any:
    """The power of two just below each float64 lane; subnormal ones give 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.VectorType(_INT64, LANES)
        mask = ir.Constant(bits, [0x7FF << 52] * LANES)
        power = builder.and_(builder.bitcast(args[0], bits), mask)
        return builder.bitcast(power, _vector(types.float64))

    return _DOUBLES(_DOUBLES), generate


@_intrinsic
def _if_less(context: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """`then` in the lanes in which a < b, and not NaN; else `other`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), *args[2:])

    return _DOUBLES(*[_DOUBLES] * 4), generate


def _times(builder: Any, values: Any, slope: Any) -> Any:
    """values * slope, and 0 for a slope of 0 whatever the values."""
    zeros = ir.Constant(values.type, [0.0] * LANES)
    blocked = builder.fcmp_ordered("==", slope, zeros)
    return builder.select(blocked, zeros, builder.fmul(values, slope))


@_intrinsic
def _activated(context: Any, value: Any, slope: Any, top: Any) -> Any:
    """value <= 0 ? slope * value : min(value, top)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, slope, top = args
        negative = builder.fcmp_ordered("<=", value, ir.Constant(value.type, [0.0] * LANES))
        below = builder.select(builder.fcmp_ordered(">", value, top), top, value)
        return builder.select(negative, _times(builder, value, slope), below)

    return value(value, value, value), generate


@_intrinsic
def _let_through(context: Any, dy: Any, y: Any, slope: Any, top: Any) -> Any:
    """y <= 0 ? slope * dy : y >= top ? 0 : dy."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dy, y, slope, top = args
        negative = builder.fcmp_ordered("<=", y, ir.Constant(y.type, [0.0] * LANES))
        flat = builder.fcmp_ordered(">=", y, top)
        above = builder.select(flat, ir.Constant(dy.type, [0.0] * LANES), dy)
        return builder.select(negative, _times(builder, dy, slope), above)

    return dy(dy, y, dy, y), generate


@_intrinsic
def _picks(context: Any, address: Any) -> Any:
    """LANES bytes of a mask."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _bytes(builder, args[0])

    return _PICKS(types.int64), generate


def _bytes(builder: Any, address: Any) -> Any:
    pointer = builder.inttoptr(address, _vector(types.uint8).as_pointer())
    return builder.load(pointer, align=1)


@_intrinsic
def _numbers(context: Any, address: Any, first: Any) -> Any:
    """LANES places or samples, of which the last byte is in memory, counted from `first`: 0 to
    LANES - 1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = _splat(builder, builder.trunc(args[1], _INT8))
        most = ir.Constant(first.type, [LANES - 1] * LANES)
        return builder.and_(builder.sub(_bytes(builder, args[0]), first), most)

    return _PICKS(types.int64, types.int64), generate


@_intrinsic
def _number(context: Any, address: Any) -> Any:
    """The byte at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = builder.load(builder.inttoptr(args[0], _INT8.as_pointer()))
        return builder.zext(byte, _INT64)

    return types.int64(types.int64), generate


@_intrinsic
def _picks_by(context: Any, address: Any, numbers: Any) -> Any:
    """For each lane the byte of its number; one instruction, where the processor has it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _permuted(builder, _bytes(builder, args[0]), _opaque(builder, args[1]))

    return _PICKS(types.int64, _PICKS), generate


@_intrinsic
def _weights_by(context: Any, address: Any, numbers: Any, few: Any, element: Any) -> Any:
    """For each lane the weight of its number, in the type in which `element` is worked on; numbers
    are below LANES / 2 if `few` is not None."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow, lanes = element != types.float64, _vector(element)
        if not _permutes():
            weights = _gathered(builder, args[0], args[1])
            return builder.fptrunc(weights, lanes) if narrow else weights
        numbers, pointer = _opaque(builder, args[1]), _pointer(builder, args[0], types.float64)
        if few != types.none and not narrow:
            half = ir.VectorType(_FLOAT64, LANES // 2)
            weights = builder.load(builder.bitcast(pointer, half.as_pointer()), align=8)
            return _permuted_halves(builder, weights, numbers)
        weights = builder.load(pointer, align=8)
        if narrow:
            return _permuted(builder, builder.fptrunc(weights, lanes), numbers)
        lower, upper = (builder.shuffle_vector(weights, weights, part) for part in _HALVES)
        most = ir.Constant(numbers.type, [LANES // 2 - 1] * LANES)
        from_upper = builder.icmp_unsigned(">", numbers, most)
        both = (_permuted_halves(builder, values, numbers) for values in (upper, lower))
        return builder.select(from_upper, *both)

    return _lanes(element)(types.int64, _PICKS, few, element), generate


@cache
def _permutes() -> bool:
    """Whether one instruction gives `_permuted` weights, in half the time of gathering them. Others
    would store and load them one by one."""
    features = _numba.config.CPU_FEATURES or binding.get_host_cpu_features().flatten()
    return "+avx512f" in features.split(",")


def _gathered(builder: Any, address: Any, numbers: Any) -> Any:
    """LANES float64 of such numbers, counted from an address."""
    offsets = builder.zext(numbers, ir.VectorType(_INT64, LANES))
    offsets = builder.shl(offsets, ir.Constant(offsets.type, [3] * LANES))
    addresses = builder.add(_splat(builder, address), offsets)
    pointers = builder.inttoptr(addresses, ir.VectorType(_FLOAT64.as_pointer(), LANES))
    every = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES)
    lanes = _vector(types.float64)
    args = [pointers, ir.Constant(_INT32, 8), every, ir.Constant(lanes, ir.Undefined)]
    name = f"llvm.masked.gather.v{LANES}f64.v{LANES}p0"
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(lanes, [arg.type for arg in args])
    return builder.call(known or ir.Function(builder.module, kind, name), args)


def _permuted(builder: Any, data: Any, numbers: Any) -> Any:
    """The values of such numbers, spelled as LLVM knows it."""
    permuted = ir.Constant(data.type, ir.Undefined)
    for lane in range(data.type.count):
        at = ir.Constant(_INT32, lane)
        number = builder.zext(builder.extract_element(numbers, at), _INT64)
        permuted = builder.insert_element(permuted, builder.extract_element(data, number), at)
    return permuted


def _permuted_halves(builder: Any, data: Any, numbers: Any) -> Any:
    """LANES of LANES / 2 values, whose numbers begin again at LANES / 2."""
    most = ir.Constant(ir.VectorType(_INT8, LANES // 2), [LANES // 2 - 1] * (LANES // 2))
    halves = (builder.shuffle_vector(numbers, numbers, part) for part in _HALVES)
    permuted = [_permuted(builder, data, builder.and_(half, most)) for half in halves]
    return builder.shuffle_vector(*permuted, _indices(0, LANES))


def _opaque(builder: Any, numbers: Any) -> Any:
    """The same, which the compiler cannot take out of a loop, lane by lane."""
    if platform.machine() != "x86_64":
        return numbers
    kind = ir.FunctionType(numbers.type, [numbers.type])
    return builder.asm(kind, "", "=x,0", [numbers], True)


@_intrinsic
def _pick(context: Any, value: Any, picks: Any) -> Any:
    """The lanes that count, and zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, picks = args
        counts = builder.icmp_unsigned("!=", picks, ir.Constant(picks.type, [0] * LANES))
        return builder.select(counts, value, ir.Constant(value.type, [0.0] * LANES))

    return value(value, _PICKS), generate


@_intrinsic
def _pick_weighed(context: Any, value: Any, weight: Any) -> Any:
    """The float64 lanes that weigh anything, and zeros; bit by bit, for LLVM would join picks and
    comparisons, at some expense."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value, weight), lanes = args, ir.VectorType(_INT64, LANES)
        weighs = builder.fcmp_ordered(">", weight, ir.Constant(weight.type, [0.0] * LANES))
        bits = builder.and_(builder.bitcast(value, lanes), builder.sext(weighs, lanes))
        return builder.bitcast(bits, value.type)

    return _DOUBLES(_DOUBLES, _DOUBLES), generate


# ---- Compiling -----------------------------------------------------------------------------------


_INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _inline(function: F) -> F:
    """A part of kernels."""
    compiled: F = _numba.njit(function, **_INNER, forceinline=True)
    return compiled


def _part(function: F) -> F:
    """A part that is called."""
    compiled: F = _numba.njit(function, **_INNER)
    return compiled


def _compile(function: F, parallel: bool = False) -> F:
    """A kernel: compiled at its first call, and kept on disk where numba finds a place."""
    compiled = _numba.njit(function, error_model="numpy", nogil=True, parallel=parallel)
    _cache_on_disk(compiled, function)
    kernel: F = compiled
    return kernel


def _cache_on_disk(compiled: Any, function: Callable[..., Any]) -> None:
    """Keep what is compiled of a function, where there is a directory for it."""
    with suppress(RuntimeError):
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]


class _Cache(caching.FunctionCache):
    """Numba's files, which bring back what was compiled or else are as good as none: empty,
    truncated, of another user, on a full disk."""

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception:  # whatever unpickling makes of what is there
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]  # the index may be what is broken
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)  # type: ignore[no-untyped-call]


class _Kernel:
    """A kernel over tasks in any order: serial, or on threads where that is safe now."""

    _lock = threading.Lock()
    _process = os.getpid()

    def __init__(self, function: Callable[..., None]) -> None:
        twin = FunctionType(function.__code__, function.__globals__)
        twin.__qualname__ += "_parallel"  # the cache knows functions by name, not by options
        self._serial = _compile(function)
        self._parallel = _compile(twin, parallel=True)

    def __call__(self, threads: int, *args: Any) -> None:
        if threads > 1 and _Kernel._lock.acquire(blocking=False):
            try:
                if self._threads_work():
                    self._run_parallel(threads, (threads, *args))
                    return
            finally:
                _Kernel._lock.release()
        self._serial(1, *args)

    def _run_parallel(self, threads: int, args: tuple[Any, ...]) -> None:
        before = _numba.get_num_threads()
        if before == threads:
            self._parallel(*args)
            return
        _numba.set_num_threads(threads)
        try:
            self._parallel(*args)
        finally:
            _numba.set_num_threads(before)

    @staticmethod
    def _threads_work() -> bool:
        """Whether threads can run in this process now.

        OpenMP's are lost in a forked child; "workqueue" ends the process when anybody else, in
        another Python thread, runs parallel code of their own at the same time.
        """
        try:
            layer = _numba.threading_layer()
        except ValueError:  # none have been started yet
            _Kernel._process = os.getpid()
            return True
        if layer == "workqueue":
            return threading.active_count() == 1
        return bool(layer != "omp" or _Kernel._process == os.getpid())


# ---- A call as the kernels see it ----------------------------------------------------------------


_OPERAND = np.dtype([(name, np.int64) for name in ("address", "run", "row", "column")])
"""An array: its address, and its strides in bytes; columns are the channels of rows."""
_JOB = np.dtype(
    [
        # `beside` is a tail's residual or a gate's y, `through` is where the gated dy goes; where
        # there is none of them, another array stands for it.
        *((name, _OPERAND) for name in ("x", "dy", "beside", "through", "out")),
        *((name, np.int64) for name in ("summed", "written", "inside")),
        # Of a tail whether it has a residual; of a gate whether its y is an array of its own, and
        # how the gated dy is written.
        *((name, np.int64) for name in ("residual", "gated", "lets")),
        # Rows of `columns` values, perhaps one more of only `rest`: a row of memory holds `fold`
        # samples of `channels` channels of `spread` values. Planes have `size` values.
        *((name, np.int64) for name in ("runs", "rows", "columns", "size", "rest")),
        *((name, np.int64) for name in ("fold", "channels", "spread")),
        # A chunk is `height` rows, or a `piece` of one.
        *((name, np.int64) for name in ("height", "piece", "pieces", "chunks")),
        # No bit depends on these.
        *((name, np.int64) for name in ("split", "shared", "stream", "joined", "lookahead")),
        *((name, np.int64) for name in ("fetch", "planes_ahead", "block", "written_block")),
        # Rows that are summed, and written, together: they share the fetching of tables.
        *((name, np.int64) for name in ("few", "together")),
        # Addresses: what is given for each channel and receives results; for each column, of which
        # a run has `pitch`, shift and unit of the sums and the two sums; the sums of each chunk;
        # coefficients; the next block; the bodies.
        *((name, np.int64) for name in ("pitch", "table", "work", "sums", "packed", "counter")),
        *((name, np.int64) for name in ("here", "start", "sum", "finish", "write")),
        # A selection: its addresses; bytes from a run's to the next, and of the mask from a row's;
        # the last place from which a whole vector may be read, and how far what lies behind it is
        # from a copy with zeros behind.
        *((name, np.int64) for name in ("mask", "mask_run", "mask_row", "mask_last", "mask_end")),
        *((name, np.int64) for name in ("weights", "weights_run", "weights_last", "weights_end")),
        # Samples that weigh alike; from a row to the next, bytes of weights and samples over.
        *((name, np.int64) for name in ("alike", "weights_row", "over")),
        # Addresses: of each run the first place that counts; of each column the first place of the
        # picks that begin there, its own, and its sample; how many weights further a sample is.
        *((name, np.int64) for name in ("firsts", "bases", "places", "samples", "further")),
        # What sums are divided by, for a mean.
        ("count", np.float64),
        *((name, np.float64) for name in ("eps", "slope", "top")),
    ]
)
"""A call as its kernels see it."""


@_inline
def _fold(samples: int, channels: int, size: int) -> int:
    """Samples to a row of memory, so that rows are whole lanes; 1 where that does not pay."""
    columns, fold = channels * size, 1
    if columns < FOLD_BELOW or (columns % LANES and samples * columns >= MANY):
        while fold * columns % LANES:
            fold *= 2
    return fold if fold * columns <= MOST_FOLDED else 1


@_inline
def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@_inline
def _job_at(address: int) -> Any:
    return _numba.carray(_jobs(address), 1)[0]


@_inline
def _set_operand(a: Any, place: Any, inside: bool, dense: int, size: int) -> None:
    """Rows of several samples, or of tiny planes, are dense."""
    a.address, a.run, a.row, a.column = place
    if inside:
        a.column = size
        a.row = dense if dense else a.row


@_inline
def _even_block(columns: int, most: int, whole: int, parts: tuple[int, int]) -> int:
    """Columns of a block: about so many at most, in at least and in multiples of so many parts."""
    least, multiple = parts
    blocks = _ceil(max(least, _ceil(columns, max(most, whole))), multiple) * multiple
    return min(_ceil(_ceil(columns, blocks), whole) * whole, columns)


@_compile
def _cut(rows: int, size: int) -> tuple[int, int, int, int]:
    """Rows to a chunk or, of a longer row, values; pieces of a row, and chunks."""
    if size == 1:
        height = min(max(_ceil(_ceil(rows, 32), 8) * 8, 64), 512)
        return height, 1, 1, max(1, _ceil(rows, height))
    height, piece, pieces = max(1, CHUNK // size), size, _ceil(size, CHUNK)
    if pieces > 1:
        piece = _ceil(_ceil(size, pieces), 64) * 64
        pieces = _ceil(size, piece)
    return height, piece, pieces, _ceil(rows, height) * pieces


@_inline
def _set_shape(job: Any, shape: tuple[int, int, int, int]) -> None:
    """Rows, columns and chunks: they follow from the shape and the element type."""
    runs, samples, channels, s = shape
    inside = s < LANES
    fold = _fold(samples, channels, s) if inside else 1
    spread, size = (s, 1) if inside else (1, s)
    columns, rows = fold * channels * spread, samples // fold
    height, piece, pieces, chunks = _cut(rows, size)
    job.inside, job.runs, job.rows, job.columns, job.size = inside, runs, rows, columns, size
    job.rest, job.count = samples % fold * channels * spread, samples * s
    job.fold, job.channels, job.spread = fold, channels, spread
    job.height, job.piece, job.pieces, job.chunks = height, piece, pieces, chunks
    job.pitch = (columns // LANES + 2) * LANES


@_inline
def _schedule(job: Any, threads: int, itemsize: int, machine: Any) -> None:
    """The order of work, on which no bit depends."""
    l2, block, ahead, stream_from, streamed_row, stretch, sparse, fetch = machine
    inside, columns, s = job.inside != 0, job.columns, job.size
    trip, writes = job.summed != NOTHING, job.written != NOTHING
    inputs = (2 if job.summed == GRADIENTS or job.written == GRADIENT else 1) + job.gated
    arrays = inputs + writes + job.residual + (job.lets != NOT)
    column = (job.rows + (job.rest > 0)) * s * itemsize * inputs
    total = job.runs * (job.rows * columns + job.rest) * s * itemsize * arrays
    line = (columns if inside else s) * itemsize
    large, job.joined = total >= stream_from, not inside and s <= JOINED
    whole_lines = job.joined or line % 64 == 0 or line >= streamed_row
    job.stream = large and writes and whole_lines
    job.planes_ahead = 0 if inside or s > 4 * AHEAD else AHEAD // s + 1
    lookahead, split, most = False, True, columns
    if inside and trip:
        most = stretch if large else stretch // inputs
    elif trip:
        groups = job.runs * columns
        split = 10 * groups < 9 * _ceil(groups, threads) * threads
        most = 1 if split else block // column
        lookahead = not split and writes and 2 * threads * column * max(most, 1) <= ahead
    shared = not split and total > threads * l2
    units = job.runs * (job.chunks if split else 1)
    parts = _ceil(threads * (4 if shared else 1), units), threads if not split else 1
    whole = columns if columns > job.channels else LANES if inside else 1
    job.split, job.shared, job.lookahead = split, shared, lookahead
    job.fetch = total >= threads * fetch
    job.block = _even_block(columns, most, whole, parts)
    job.written_block = _even_block(columns, columns, whole, parts)
    sparing = large and job.summed == GRADIENTS
    job.few = max(1, sparse // job.block) if sparing else max(4, stretch // job.block)
    job.together = max(1, sparse // columns) if large else max(4, stretch // columns)


@_inline
def _is_twin(job: Any) -> Any:
    """Whether what is let through lies in its cache lines as dx does."""
    a, b = job.out, job.through
    strides = a.run == b.run and a.row == b.row and a.column == b.column
    return strides and (a.address - b.address) % 64 == 0


@_compile
def _plan(words: Array, asked: Any, aside: Any, eps: float, table: Table) -> int:
    """Make the job; gives the float64 numbers that it needs to work with. `aside` is what a tail
    or a gate asks, or None."""
    threads, size = asked[:2]
    job = _job_at(words.ctypes.data)
    job.summed, job.written = asked[2:4]
    beside, through = asked[24:28], asked[28:32]
    if aside is not None:
        beside, through = aside[0][3:7], aside[0][7:11]
        job.residual, job.gated, job.lets = aside[0][:3]
        job.slope, job.top = aside[1:]
    _set_shape(job, asked[4:8])
    _schedule(job, threads, size, asked[8:16])
    job.table, job.eps, job.here = table.ctypes.data, eps, words.ctypes.data
    job.start, job.sum, job.finish, job.write = asked[16:20]
    inside = job.inside != 0
    dense = job.columns * size if job.columns > job.channels else 0
    _set_operand(job.x, asked[20:24], inside, dense, size)
    _set_operand(job.dy, asked[24:28], inside, dense, size)
    _set_operand(job.beside, beside, inside, dense, size)
    _set_operand(job.through, through, inside, dense, size)
    _set_operand(job.out, asked[28:32], inside, dense, size)
    if job.lets != NOT and job.stream and _is_twin(job):
        job.lets = AS_OUT
    width = job.runs * job.pitch
    return int(width * 8 + (width * (4 + 2 * job.chunks) if job.summed != NOTHING else 0))


@_inline
def _first_place(mask: Array, weights: Table, places: int) -> int:
    """The first of a run's places that weighs in its statistics."""
    alike = places // weights.size
    for part in range(weights.size):
        for place in range(part * alike, (part + 1) * alike if weights[part] > 0.0 else 0):
            if mask[place]:
                return place
    return 0


@_inline
def _set_places(job: Any, bases: Array, places: Array, samples: Array) -> None:
    """Of each column its sample, the place of its value in the mask of its row, and the first place
    of the LANES columns from there on: a sample's, where they go round the end of a tiny plane."""
    spread, channels, channel, sample = job.spread, job.channels, 0, 0
    for start in range(0, bases.size, spread):
        channel += 1
        first = sample * spread
        for s in range(spread):
            around = s + LANES > spread and channel < channels
            bases[start + s] = first if around else first + s
            places[start + s] = (first + s) & 0xFF
            samples[start + s] = sample
        if channel == channels:
            channel, sample = 0, sample + 1


@_inline
def _set_further(job: Any, further: Array) -> None:
    """Of samples -LANES to LANES - 1, counted from the next weight on, which weight they have."""
    for number in range(2 * LANES):
        further[number] = 0 if number < LANES else 1 + (number - LANES) // job.alike


@_inline
def _copy_end(values: Array, copy: Array) -> tuple[int, int]:
    """The last address at which a vector of `values` may begin, and how far those that begin behind
    it are from their `copy`."""
    size, kept = values.itemsize, min(values.size, LANES - 1)
    copy[:] = 0
    copy[:kept] = values[values.size - kept :]
    end = values.ctypes.data + values.size * size
    return end - LANES * size, copy.ctypes.data + kept * size - end


@_compile
def _select(words: Array, mask: Array, weights: Table, count: float) -> Any:
    """Tell a job which places count; gives the tables that it needs for that. Its own count is of
    all places until then."""
    job = _job_at(words.ctypes.data)
    # Picks may go round a row's end.
    width = _ceil(job.columns + 2 * LANES, job.spread) * job.spread if job.inside else 0
    firsts, bases = np.empty(job.runs, np.int64), np.empty(width, np.int64)
    numbers, ends = np.empty(2 * width + 4 * LANES, np.uint8), np.empty(2 * LANES)
    for run in range(job.runs):
        firsts[run] = _first_place(mask[run], weights[run], int(job.count))
    places, samples, further = numbers[:width], numbers[width : 2 * width], numbers[2 * width :]
    _set_places(job, bases, places, samples)
    job.firsts, job.bases, job.places = firsts.ctypes.data, bases.ctypes.data, places.ctypes.data
    job.samples, job.further = samples.ctypes.data, further.ctypes.data + LANES
    job.mask, job.mask_run = mask.ctypes.data, mask.strides[0]
    job.mask_row = job.fold * job.spread * job.size
    job.mask_last, job.mask_end = _copy_end(mask.reshape(-1), further[2 * LANES :])
    job.weights, job.weights_run = weights.ctypes.data, weights.strides[0]
    job.weights_last, job.weights_end = _copy_end(weights.reshape(-1), ends)
    each = job.spread * job.size
    job.alike = mask.shape[1] // each // weights.shape[1]
    job.weights_row, job.over = job.fold // job.alike * 8, job.fold % job.alike
    _set_further(job, further)
    job.count = count
    return firsts, bases, numbers, ends


@_inline
def _at(a: Any, run: int, n: int, c: int) -> Any:
    """Address of a value."""
    return a.address + run * a.run + n * a.row + c * a.column


@_inline
def _chunk(job: Any, index: int) -> tuple[int, int, int, int]:
    """Rows n0 to n1 and their values s0 to s1."""
    n0, s0 = index // job.pieces * job.height, index % job.pieces * job.piece
    return n0, min(n0 + job.height, job.rows), s0, min(s0 + job.piece, job.size)


@_inline
def _blocks(job: Any, size: int) -> Any:
    """How many blocks of so many columns there are."""
    return job.runs * _ceil(job.columns, size)


@_inline
def _block(job: Any, index: int, size: int) -> tuple[int, int, int]:
    """Run and columns c0 to c1 of a block."""
    blocks = _ceil(job.columns, size)
    c0 = index % blocks * size
    return index // blocks, c0, min(c0 + size, job.columns)


@_inline
def _table(job: Any) -> Any:
    return _numba.carray(_doubles(job.table), (TABLE, job.runs * job.channels))


@_inline
def _work(job: Any) -> Any:
    return _numba.carray(_doubles(job.work), (4, job.runs * job.pitch))


@_inline
def _sums(job: Any) -> Any:
    return _numba.carray(_doubles(job.sums), (job.chunks, 2, job.runs * job.pitch))


# ---- Selections ----------------------------------------------------------------------------------
# `masked`, and `weighed` where weights matter, are True or None, which numba tells apart as it
# compiles: None leaves no trace.


class _Row(NamedTuple):
    """A row's places, or those of columns: where their mask is, where the weight of the first
    sample is, in how many samples the next one begins, and whether weights matter."""

    mask: int
    weight: int
    left: int
    weighed: Any


class _Columns(NamedTuple):
    """LANES columns: their first place and sample, which places and samples they are from there on,
    and the last of these samples."""

    first: _Row
    numbers: Any
    samples: Any
    last: int


class _Picked(NamedTuple):
    """LANES picks, weights if they matter, and these again where values that weigh nothing may not
    be looked at."""

    picks: Any
    weight: Any
    seen: Any


@_inline
def _row_selected(job: Any, masked: Any, weighed: Any, run: int, n: int, s: int) -> Any:
    """A row, or a plane from value s on."""
    if masked is None:
        return None
    mask = job.mask + run * job.mask_run + n * job.mask_row + s
    sample = n * job.fold
    weight = job.weights + run * job.weights_run + sample // job.alike * 8
    return _Row(mask, weight, job.alike - sample % job.alike, weighed)


@_inline
def _columns_selected(job: Any, masked: Any, row: Any, c: int) -> Any:
    """Columns of a row from c on."""
    if masked is None:
        return None
    mask, weight, left, weighed = row
    base, sample = _integer(job.bases + c * 8), _number(job.samples + c)
    further = _number(job.further + sample - left) if sample >= left else 0
    left += further * job.alike - sample
    first = _Row(mask + base, weight + further * 8, left, weighed)
    samples = _numbers(job.samples + c, sample)
    last = _number(job.samples + c + LANES - 1) - sample
    return _Columns(first, _numbers(job.places + c, base), samples, last)


@_inline
def _next_row(job: Any, masked: Any, row: Any) -> Any:
    """The next row, or plane."""
    if masked is None:
        return None
    mask, weight, left, weighed = row
    mask, weight, left = mask + job.mask_row, weight + job.weights_row, left - job.over
    if left <= 0:
        return _Row(mask, weight + 8, left + job.alike, weighed)
    return _Row(mask, weight, left, weighed)


@_inline
def _next_columns(job: Any, masked: Any, columns: Any) -> Any:
    """The same columns of the next row."""
    if masked is None:
        return None
    first, numbers, samples, last = columns
    return _Columns(_next_row(job, masked, first), numbers, samples, last)


@_inline
def _inside(address: int, last: int, end: int) -> int:
    """The address of a vector; of its copy, if it does not end before its array does."""
    return address if address <= last else address + end


@_inline
def _plane_picked(job: Any, masked: Any, plane: Any, s: int, count: int, element: Any) -> Any:
    """The picks of up to `count` values of a plane from s on, and their weight."""
    if masked is None:
        return None
    mask = plane.mask + s
    if count < LANES:
        mask = _inside(mask, job.mask_last, job.mask_end)
    return _Picked(_picks(mask), _weight(plane.weighed, plane, element), None)


@_inline
def _columns_picked(job: Any, masked: Any, columns: Any, element: Any) -> Any:
    """The picks of columns, and their weights."""
    if masked is None:
        return None
    mask = _inside(columns.first.mask, job.mask_last, job.mask_end)
    picks = _picks_by(mask, columns.numbers)
    return _Picked(picks, _weights(job, columns.first.weighed, columns, element), None)


@_inline
def _weight(weighed: Any, row: Any, element: Any) -> Any:
    """The first weight in all lanes."""
    if weighed is None:
        return None
    return _narrow(_spread(_value(row.weight, 0.0)), element)


@_inline
def _weights(job: Any, weighed: Any, columns: Any, element: Any) -> Any:
    """Each lane's weight."""
    if weighed is None:
        return None
    first = columns.first
    if columns.last < first.left:
        return _weight(weighed, first, element)
    further = _picks_by(job.further - first.left, columns.samples)
    weights = _inside(first.weight, job.weights_last, job.weights_end)
    if columns.last < LANES // 2:
        return _weights_by(weights, further, True, element)
    return _weights_by(weights, further, None, element)


@_inline
def _weighs(masked: Any, plane: Any) -> Any:
    """Whether a plane is looked at for moments."""
    if masked is None:
        return True
    return _is_weighed(plane.weighed, plane)


@_inline
def _is_weighed(weighed: Any, plane: Any) -> Any:
    """Whether it weighs anything, if that matters."""
    if weighed is None:
        return True
    return _value(plane.weight, 0.0) != 0.0


@_inline
def _looked_at(some: Any) -> Any:
    """Picked columns, of which moments look at those that weigh anything."""
    if some is None:
        return None
    return _Picked(some.picks, some.weight, some.weight)


@_inline
def _kept(value: Any, some: Any) -> Any:
    """Zeros where nothing counts."""
    if some is None:
        return value
    return _kept_of(value, some.picks, some.seen)


@_inline
def _kept_of(value: Any, picks: Any, seen: Any) -> Any:
    """The same of picked values."""
    if seen is None:
        return _pick(value, picks)
    return _pick_weighed(_pick(value, picks), seen)


@_inline
def _weighed(value: Any, some: Any) -> Any:
    """Times the weight, if that matters."""
    if some is None:
        return value
    return _times_weight(value, some.weight)


@_inline
def _times_weight(value: Any, weight: Any) -> Any:
    """The same of picked values."""
    if weight is None:
        return value
    return value * weight


# ---- Reductions ----------------------------------------------------------------------------------


@_inline
def _values(address: int, count: int, element: Any) -> Any:
    """Lanes of up to `count` values, then zeros."""
    if count >= LANES:
        return _load(address, element)
    return _load_some(address, count, element)


@_inline
def _gate_lanes(job: Any, gate: Any, like: Any, element: Any) -> Any:
    """A gate's slope, in the type of what it multiplies, its top, and how the gated dy is
    written; None without a gate."""
    if gate is None:
        return None
    top = _narrow(_spread(job.top), element)
    return _narrow(_spread(job.slope), like), top, job.lets


@_inline
def _add(
    at: Any,
    count: int,
    about: Any,
    sums: Any,
    with_dy: bool,
    gate: Any,
    some: Any,
    element: Any,
) -> Any:
    """To two sums add d = (x - shift) * unit, weighed, or dy, and that times d, of up to `count`
    values."""
    x, dy, y = at
    d = _kept(_widen(_values(x, count, element)) - about[0], some)
    if count < LANES:
        d = _keep(d, count)
    d = _rescale(d, about[1], element)
    value = _widen(_values(dy, count, element)) if with_dy else _weighed(d, some)
    if gate is not None:
        value = _let_through(value, _values(y, count, element), gate[0], gate[1])
    if with_dy:
        value = _kept(value, some)
    return sums[0] + value, sums[1] + value * d


@_inline
def _later(job: Any, a: Any, n: int, size: int) -> Any:
    """From a value of plane n to the one that comes about AHEAD values later."""
    if job.planes_ahead == 0:
        return AHEAD * size
    if n + job.planes_ahead < job.rows:
        return job.planes_ahead * a.row
    return (job.planes_ahead - job.rows) * a.row + a.column


@_inline
def _fetch(wanted: int, address: int) -> None:
    """Of the next lanes the first line, where the job says so: float64 ones have two."""
    if wanted:
        _prefetch(address)


@_inline
def _fetch_summed(wanted: int, at: Any, with_dy: bool, gate: Any) -> None:
    """Fetch what sums read."""
    _fetch(wanted, at[0])
    if with_dy:
        _fetch(wanted, at[1])
    if gate is not None:
        _fetch(wanted, at[2])


@_inline
def _summed(job: Any, run: int, n: int, c: int) -> tuple[int, int, int]:
    """Where a value is in the arrays that sums read."""
    return _at(job.x, run, n, c), _at(job.dy, run, n, c), _at(job.beside, run, n, c)


@_inline
def _by(at: Any, x: int, dy: int, y: int) -> tuple[int, int, int]:
    """Some bytes further, in each array."""
    return at[0] + x, at[1] + dy, at[2] + y


@_inline
def _sum_plane(
    job: Any,
    at: Any,
    count: int,
    about: Any,
    sums: Any,
    ahead: Any,
    with_dy: bool,
    gate: Any,
    masked: Any,
    plane: Any,
    element: Any,
) -> Any:
    """To two sums add `count` values that lie side by side, while those ahead are fetched."""
    size = _itemsize(element)
    whole = (count - count % LANES) * size
    for s in range(0, whole, LANES * size):
        here, some = _by(at, s, s, s), _plane_picked(job, masked, plane, s // size, LANES, 0.0)
        _fetch_summed(job.fetch, _by(here, ahead[0], ahead[1], ahead[2]), with_dy, gate)
        sums = _add(here, LANES, about, sums, with_dy, gate, some, element)
    if count % LANES:
        here = _by(at, whole, whole, whole)
        some = _plane_picked(job, masked, plane, whole // size, count % LANES, 0.0)
        sums = _add(here, count % LANES, about, sums, with_dy, gate, some, element)
    return sums


@_inline
def _sum_planes(
    job: Any,
    run: int,
    c0: int,
    c1: int,
    index: int,
    with_dy: bool,
    gate: Any,
    masked: Any,
    weighed: Any,
    element: Any,
) -> None:
    """The sums of channels c0 to c1 over a chunk."""
    x, dy, y, work, sums = job.x, job.dy, job.beside, _work(job), _sums(job)
    size, lanes = _itemsize(element), _gate_lanes(job, gate, 0.0, element)
    n0, n1, s0, s1 = _chunk(job, index)
    for c in range(c0, c1):
        column = run * job.pitch + c
        about = _spread(work[0, column]), _spread(work[1, column])
        both = _spread(0.0), _spread(0.0)
        plane = _row_selected(job, masked, weighed, run, n0, s0)
        for n in range(n0, n1):
            at = _by(_summed(job, run, n, c), s0 * size, s0 * size, s0 * size)
            ahead = _later(job, x, n, size), _later(job, dy, n, size), _later(job, y, n, size)
            if _weighs(masked, plane):
                both = _sum_plane(
                    job, at, s1 - s0, about, both, ahead, with_dy, lanes, masked, plane, element
                )
            plane = _next_row(job, masked, plane)
        sums[index, 0, column], sums[index, 1, column] = _total(both[0]), _total(both[1])


@_inline
def _sum_rows(
    job: Any,
    run: int,
    c0: int,
    c1: int,
    index: int,
    with_dy: bool,
    gate: Any,
    masked: Any,
    weighed: Any,
    element: Any,
) -> None:
    """The sums of columns c0 to c1 over a chunk, a few rows at a time; each has its own lanes."""
    x_row, dy_row, y_row = job.x.row, job.dy.row, job.beside.row
    n0, n1, _, _ = _chunk(job, index)
    pitch, lanes = job.runs * job.pitch * 8, _gate_lanes(job, gate, 0.0, element)
    offset = (run * job.pitch + c0) * 8
    tables, sums = job.work + offset, job.sums + index * 2 * pitch + offset
    for c in range(0, (c1 - c0) * 8, LANES * 8):
        _store(sums + c, _spread(0.0), 0.0)
        _store(sums + pitch + c, _spread(0.0), 0.0)
    few = job.few
    ahead = (AHEAD // (few * (c1 - c0)) + 1) * few
    n, end = n0, job.rows + 1 if job.rest and n1 == job.rows else n1
    while n < end:
        rows, width = min(few, n1 - n), c1 - c0
        if n == job.rows:
            rows, width = 1, min(c1, job.rest) - c0
        row = _row_selected(job, masked, weighed, run, n, 0)
        for c in range(0, width, LANES):
            at = _summed(job, run, n, c0 + c)
            columns = _columns_selected(job, masked, row, c0 + c)
            table, total = tables + c * 8, sums + c * 8
            about = _load(table, 0.0), _load(table + pitch, 0.0)
            both = _load(total, 0.0), _load(total + pitch, 0.0)
            for _ in range(rows):
                later = _by(at, ahead * x_row, ahead * dy_row, ahead * y_row)
                _fetch_summed(job.fetch, later, with_dy, gate)
                some = _looked_at(_columns_picked(job, masked, columns, 0.0))
                if width - c >= LANES:
                    both = _add(at, LANES, about, both, with_dy, lanes, some, element)
                else:
                    both = _add(at, width - c, about, both, with_dy, lanes, some, element)
                at, columns = _by(at, x_row, dy_row, y_row), _next_columns(job, masked, columns)
            _store(total, both[0], 0.0)
            _store(total + pitch, both[1], 0.0)
        n += rows


# ---- The small step: from sums to coefficients, in float64 ---------------------------------------
# `work` holds, for each column, shift and unit of the sums, and the two sums.


@_inline
def _set_columns(job: Any, work: Table, row: int, run: int, c: int, value: float) -> None:
    """Give all columns of channel c a value."""
    for copy in range(job.fold):
        start = run * job.pitch + (copy * job.channels + c) * job.spread
        for column in range(start, start + job.spread):
            work[row, column] = value


@_inline
def _first(job: Any, run: int, c: int, size: int) -> Any:
    """Where a channel's first value is that counts."""
    place, plane = _integer(job.firsts + run * 8) if job.firsts else 0, job.spread * job.size
    n, s = place // plane, place % plane
    column = (n % job.fold * job.channels + c) * job.spread
    return _at(job.x, run, n // job.fold, column) + s * size


@_inline
def _set_shifts(job: Any, run: int, c0: int, c1: int, element: Any) -> None:
    """What is subtracted before summing: a channel's first value that counts, or its given mean."""
    table, work = _table(job), _work(job)
    for c in range(c0, min(c1, job.channels)):
        shift = table[MEAN, run * job.channels + c]
        if job.summed == MOMENTS:
            shift = _value(_first(job, run, c, _itemsize(element)), element)
        _set_columns(job, work, 0, run, c, shift)
        _set_columns(job, work, 1, run, c, 1.0)


@_inline
def _save(address: int, value: Any, count: int, element: Any) -> None:
    """Store up to `count` lanes."""
    if count < LANES:
        _store_some(address, value, count, element)
    else:
        _store(address, value, element)


@_inline
def _merge(job: Any, run: int, c0: int, c1: int) -> None:
    """The sums of chunks added in order, then those of the columns of a channel."""
    work, row = _work(job), job.runs * job.pitch * 8
    for kind in range(2):
        for c in range(c0, c1, LANES):
            offset, total = kind * row + (run * job.pitch + c) * 8, _spread(0.0)
            for index in range(job.chunks):
                total = total + _values(job.sums + index * 2 * row + offset, c1 - c, 0.0)
            _save(job.work + 2 * row + offset, total, c1 - c, 0.0)
        for c in range(job.channels if job.columns > job.channels else 0):
            merged = 0.0
            for copy in range(job.fold):
                first = run * job.pitch + (copy * job.channels + c) * job.spread
                for column in range(first, first + job.spread):
                    merged += work[2 + kind, column]
            work[2 + kind, run * job.pitch + c] = merged


@_inline
def _is_doubtful(job: Any, run: int, c0: int, c1: int) -> bool:
    """Whether a channel's shift was far out, or its squares overflowed. Then its shift becomes the
    mean just found; the sums of the others will come out as they were."""
    work, again, per_value = _work(job), False, 1.0 / job.count
    for c in range(c0, min(c1, job.channels)):
        total, square = work[2, run * job.pitch + c], work[3, run * job.pitch + c]
        # The mean of d * d is (1 + (mean / s)**2) variances: beyond 16 deviations digits get lost.
        fits = total * (total * per_value) * (257.0 / 256.0) <= square < math.inf
        if not fits and math.isfinite(total):
            again = True
            column = run * job.pitch + c * job.spread
            _set_columns(job, work, 0, run, c, work[0, column] + total / job.count)
            if not math.isfinite(square):
                _set_columns(job, work, 1, run, c, 2.0**-600)
    return again


@_inline
def _power(a: Any, element: Any) -> Any:
    """A power of two near a >= 0, in the range of the element; 1 for 0, infinity and NaN."""
    single = _itemsize(element) == 4
    one, least = _spread(1.0), _spread(2.0**-126 if single else 2.0**-1000)
    most = _spread(2.0**127 if single else 2.0**1000)
    power = _exponent(a)
    power = _if_less(power, least, least, power)
    power = _if_less(most, power, most, power)
    return _if_less(a, _spread(math.inf), _if_less(_spread(0.0), a, power, one), one)


@_inline
def _half_way(a: Any, element: Any) -> Any:
    """1 where float32 takes a >= 0 in its stride; else a power of two near its square root."""
    power = _power(_root(a), element)
    usual = _if_less(_spread(1e-18), a, _spread(1.0), power)
    return _if_less(a, _spread(1e18), usual, power)


@_inline
def _saturated(a: Any, element: Any) -> Any:
    """a or, where it is finite, the largest float32 for larger ones: 0 times it stays 0."""
    if _itemsize(element) == 8:
        return a
    least, most = _spread(-_LARGEST), _spread(_LARGEST)
    nearest = _if_less(a, least, least, a)
    nearest = _if_less(most, nearest, most, nearest)
    return _if_less(_absolute(a), _spread(math.inf), nearest, a)


@_inline
def _unless_0(a: Any, then: Any, other: Any) -> Any:
    """`other` where a is 0."""
    return _if_less(_absolute(a), _spread(5e-324), other, then)


@_inline
def _lost(a: Any, factor: Any, element: Any) -> Any:
    """What rounding a to `element` takes off it, times a factor that may be infinite."""
    low = a - _widen(_narrow(a, element))
    return _unless_0(low, low * factor, _spread(0.0))


@_inline
def _coefficients(
    a: Any, shift: Any, rest: Any, b: Any, mean: Any, rstd: Any, both: bool, element: Any
) -> Any:
    """k of (source*k0 - k1)*k2 + k3 = (source - shift)*a + rest, to which `both` adds
    b*xhat = ((x*k4 - k5) - k6)*k7, xhat = (x - mean)*rstd.

    Powers of two (k0, k4) keep all in the range of the element. What k1 (and k5, k6) cannot hold of
    the mean goes into k3.
    """
    far = _half_way(_absolute(a), element)
    a, shift = a / far, shift * far
    rest = rest - _lost(shift, a, element)
    near = high = middle = factor = _spread(0.0)
    if both:
        # `near` goes half of b's way, so that both factors stay in range.
        half = _root(_absolute(b))
        wanted = rstd * _unless_0(half, half, _spread(1.0))
        most = _spread(1e36 if _itemsize(element) == 4 else 1e300) / _absolute(mean)
        near = _power(_if_less(wanted, most, wanted, most), element)
        factor, high = b * (rstd / near), mean * near
        middle = high - _widen(_narrow(high, element))
        rest = rest - _lost(middle, factor, element)
    a, factor = _saturated(a, element), _saturated(factor, element)
    return far, shift, a, rest, near, high, middle, factor


@_inline
def _small_step(job: Any, run: int, c0: int, c1: int, both: bool, element: Any) -> None:
    """What stands between the passes: operation by operation as in `backends.base`."""
    if job.summed != NOTHING:
        _merge(job, run, c0, c1)
    if job.summed == MOMENTS and _is_doubtful(job, run, c0, c1):
        for index in range(job.chunks):
            _invoke(job.sum, job.here, run, c0, c1, index, 0)
        _merge(job, run, c0, c1)
    if job.spread > 1 and job.summed == MOMENTS:
        work, first = _work(job), run * job.pitch
        for c in range(job.channels):
            column = first + c * job.spread
            work[0, first + c], work[1, first + c] = work[0, column], work[1, column]
    size, n, zero, one = _itemsize(element), _spread(job.count), _spread(0.0), _spread(1.0)
    pitch, end, step = job.pitch * size, min(c1, job.channels), job.runs * job.channels * 8
    lines, wide = job.packed + run * 8 * pitch, job.runs * job.pitch * 8
    for c in range(c0, end, LANES):
        count = end - c
        given = job.table + (run * job.channels + c) * 8
        sums = job.work + 2 * wide + (run * job.pitch + c) * 8
        if job.summed == MOMENTS:
            unit = _values(sums - wide, count, 0.0)
            offset = _values(sums, count, 0.0) / n
            var = _values(sums + wide, count, 0.0) / n - offset * offset
            mean = _values(sums - 2 * wide, count, 0.0) + offset / unit
            _save(given + MEAN * step, mean, count, 0.0)
            _save(given + VAR * step, _if_less(var, zero, zero, var / unit / unit), count, 0.0)
        a, beta = _values(given, count, 0.0), _values(given + BETA * step, count, 0.0)
        mean, var = (
            _values(given + MEAN * step, count, 0.0),
            _values(given + VAR * step, count, 0.0),
        )
        total = var + _spread(job.eps)
        rstd = _unless_0(total, one / _root(total), zero)
        b, shift, rest = beta, mean, beta
        if both:
            shift, rest = _values(given + DY_MEAN * step, count, 0.0), zero
        if both and job.summed == NOTHING:
            rstd, rest = var, _values(given + REST * step, count, 0.0)
        else:
            a = a * rstd
        if job.summed == GRADIENTS:
            dbeta, dgamma = _values(sums, count, 0.0), _values(sums + wide, count, 0.0) * rstd
            _save(given + DBETA * step, dbeta, count, 0.0)
            _save(given + DGAMMA * step, dgamma, count, 0.0)
            b, shift, rest = (zero - a) * (dgamma / n), (dbeta / n if both else zero), zero
        if job.written != NOTHING:
            k = _coefficients(a, shift, rest, b, mean, rstd, both, element)
            for i in range(8):
                _save(lines + i * pitch + c * size, _narrow(k[i], element), count, element)
    if job.inside and c0 == 0 and job.written != NOTHING:
        _repeat(job, lines, element)


@_inline
def _repeat(job: Any, lines: int, element: Any) -> None:
    """Coefficients for all values of a tiny plane, then for each sample in a row, and behind the
    end for vectors that go round it."""
    size, period = _itemsize(element), job.channels * job.spread
    for i in range(8):
        line = lines + i * job.pitch * size
        for column in range(period - 1 if job.spread > 1 else 0, 0, -1):
            value = _value(line + column // job.spread * size, element)
            _set_value(line + column * size, value, element)
        for column in range(period, job.columns + LANES):
            value = _value(line + (column - period) * size, element)
            _set_value(line + column * size, value, element)


# ---- Maps ----------------------------------------------------------------------------------------


@_inline
def _places(job: Any, run: int, n: int, c: int) -> tuple[int, int, int, int, int]:
    """Where a value is: in the source, the other input, beside, through and out."""
    return (
        _at(job.dy, run, n, c),
        _at(job.x, run, n, c),
        _at(job.beside, run, n, c),
        _at(job.through, run, n, c),
        _at(job.out, run, n, c),
    )


@_inline
def _rows(job: Any) -> tuple[int, int, int, int, int]:
    """From a row to the next, in each of these."""
    return job.dy.row, job.x.row, job.beside.row, job.through.row, job.out.row


@_inline
def _moved(at: Any, by: Any) -> tuple[int, int, int, int, int]:
    """Some bytes further, in each array."""
    return at[0] + by[0], at[1] + by[1], at[2] + by[2], at[3] + by[3], at[4] + by[4]


@_inline
def _along(at: Any, s: int) -> tuple[int, int, int, int, int]:
    """The same number of bytes further everywhere."""
    return _moved(at, (s, s, s, s, s))


@_inline
def _fetch_mapped(wanted: int, at: Any, both: bool, tail: Any, gate: Any) -> None:
    """Fetch what maps read."""
    _fetch(wanted, at[0])
    if both:
        _fetch(wanted, at[1])
    if tail is not None:
        _fetch(wanted, at[2])
    if gate is not None:
        _fetch(wanted, at[2])


@_inline
def _tail_lanes(job: Any, tail: Any, element: Any) -> Any:
    """A tail's slope and top, and whether it has a residual; None without a tail."""
    if tail is None:
        return None
    slope, top = _narrow(_spread(job.slope), element), _narrow(_spread(job.top), element)
    return slope, top, job.residual


@_inline
def _head(address: int, count: int, stream: int, size: int) -> int:
    """Values to write before streaming may begin, at the next cache line, or half of one where
    that is LANES values."""
    line = min(64, LANES * size)
    return min((-address & (line - 1)) // size, count) if stream else 0


@_inline
def _put(address: int, value: Any, count: int, stream: int, element: Any) -> None:
    """Up to `count` values to memory."""
    if count < LANES:
        _store_some(address, value, count, element)
    elif stream:
        _stream(address, value, element)
    else:
        _store(address, value, element)


@_inline
def _write(
    at: Any,
    count: int,
    k: Any,
    stream: int,
    both: bool,
    tail: Any,
    gate: Any,
    some: Any,
    element: Any,
) -> None:
    """Up to `count` values of what `_coefficients` describes, after a gate, before a tail; of a
    gradient, what comes from the statistics is weighed."""
    source, other, beside, through, out = at
    value = _values(source, count, element)
    if gate is not None:
        value = _let_through(value, _values(beside, count, element), gate[0], gate[1])
    if both:
        result = (value * k[0] - _weighed(k[1], some)) * k[2]
        d = (_values(other, count, element) * k[4] - k[5]) - k[6]
        result = result + _weighed(d * k[7] + k[3], some)
    else:
        result = (value * k[0] - k[1]) * k[2] + k[3]
    if tail is not None:
        if tail[2]:
            result = result + _values(beside, count, element)
        result = _activated(result, tail[0], tail[1])
    if gate is not None and gate[2] != NOT:
        _put(through, _kept(value, some), count, stream and gate[2] == AS_OUT, element)
    _put(out, _kept(result, some), count, stream, element)


@_inline
def _send(out: int, values: int, count: int, element: Any) -> int:
    """Stream the whole lines of `count` values, store what lies before them, and bring those that
    are left to the front; how many went."""
    size = _itemsize(element)
    s = _head(out, count, 1, size)
    if s > 0:
        _copy_some(out, values, s, element)
    while s + LANES <= count:
        _copy(out + s * size, values + s * size, True, element)
        s += LANES
    _copy(values, values + s * size, None, element)
    return s


@_inline
def _map_plane(
    job: Any,
    at: Any,
    count: int,
    k: Any,
    ahead: Any,
    stream: int,
    both: bool,
    tail: Any,
    gate: Any,
    masked: Any,
    plane: Any,
    element: Any,
) -> None:
    """`count` values of a channel that lie side by side, while those ahead are fetched."""
    size = _itemsize(element)
    head = _head(at[4], count, stream, size)
    if head > 0:
        some = _plane_picked(job, masked, plane, 0, head, element)
        _write(at, head, k, 0, both, tail, gate, some, element)
    whole = (head + (count - head) // LANES * LANES) * size
    for s in range(head * size, whole, LANES * size):
        here = _along(at, s)
        _fetch_mapped(job.fetch, _moved(here, ahead), both, tail, gate)
        some = _plane_picked(job, masked, plane, s // size, LANES, element)
        _write(here, LANES, k, stream, both, tail, gate, some, element)
    rest = count - whole // size
    if rest > 0:
        here = _along(at, whole)
        some = _plane_picked(job, masked, plane, whole // size, rest, element)
        _write(here, rest, k, 0, both, tail, gate, some, element)


@_inline
def _map_planes(
    job: Any,
    run: int,
    c0: int,
    c1: int,
    index: int,
    ahead: int,
    both: bool,
    tail: Any,
    gate: Any,
    masked: Any,
    weighed: Any,
    element: Any,
) -> None:
    """A chunk of some channels. Short planes are streamed as one run of lines; what is let
    through goes the same way, if it can."""
    out, size = job.out, _itemsize(element)
    n0, n1, s0, s1 = _chunk(job, index)
    wide, count = _worksize(element), s1 - s0
    pitch = job.pitch * wide
    later = job.dy.column * ahead, job.x.column * ahead, job.beside.column * ahead, 0, 0
    joined = job.joined and job.stream and out.column == job.size * size
    twins = joined and job.lets == AS_OUT
    after_tail, at_gate = _tail_lanes(job, tail, element), _gate_lanes(job, gate, element, element)
    buffer = np.empty(2 * BUFFER if joined else 0)
    for n in range(n0, n1):
        values, waiting = buffer.ctypes.data, 0
        twin = values + BUFFER * 8
        plane = _row_selected(job, masked, weighed, run, n, s0)
        sent_to, twin_to = _at(out, run, n, c0), _at(job.through, run, n, c0)
        for c in range(c0, c1):
            k = _eight(job.packed + run * 8 * pitch + c * wide, pitch, True, element)
            source, other, beside, through, target = _along(_places(job, run, n, c), s0 * size)
            if joined:
                target = values + waiting * size
                through = twin + waiting * size if twins else through
            at, stream = (source, other, beside, through, target), job.stream and not joined
            _map_plane(
                job,
                at,
                count,
                k,
                later,
                stream,
                both,
                after_tail,
                at_gate,
                masked,
                plane,
                element,
            )
            waiting += count
            if joined and (waiting >= JOINED or c + 1 == c1):
                sent = _send(sent_to, values, waiting, element)
                if gate is not None and twins:
                    _send(twin_to, twin, waiting, element)
                sent_to, twin_to = sent_to + sent * size, twin_to + sent * size
                waiting -= sent
        if joined and waiting > 0:
            _copy_some(sent_to, values, waiting, element)
            if gate is not None and twins:
                _copy_some(twin_to, twin, waiting, element)


@_inline
def _map_columns(
    job: Any,
    at: Any,
    rows: int,
    count: int,
    lines: int,
    stream: int,
    both: bool,
    tail: Any,
    gate: Any,
    masked: Any,
    columns: Any,
    element: Any,
) -> None:
    """Up to `count` columns of a few rows."""
    k = _eight(lines, job.pitch * _worksize(element), None, element)
    step = _rows(job)
    for _ in range(rows):
        _fetch_mapped(job.fetch, _along(at, AHEAD * 2), both, tail, gate)
        some = _columns_picked(job, masked, columns, element)
        _write(at, count, k, stream, both, tail, gate, some, element)
        at, columns = _moved(at, step), _next_columns(job, masked, columns)


@_inline
def _map_few(
    job: Any,
    run: int,
    n: int,
    rows: int,
    c: int,
    width: int,
    both: bool,
    tail: Any,
    gate: Any,
    masked: Any,
    weighed: Any,
    element: Any,
) -> None:
    """`width` columns from column c on, of a few rows."""
    size, wide = _itemsize(element), _worksize(element)
    lines = job.packed + (run * 8 * job.pitch + c) * wide
    at, row = _places(job, run, n, c), _row_selected(job, masked, weighed, run, n, 0)
    head = _head(at[4], width, job.stream, size)
    if head > 0:
        columns = _columns_selected(job, masked, row, c)
        _map_columns(job, at, rows, head, lines, 0, both, tail, gate, masked, columns, element)
    whole = (head + (width - head) // LANES * LANES) * size
    for s in range(head * size, whole, LANES * size):
        here, line = _along(at, s), lines + s * (wide // size)
        columns = _columns_selected(job, masked, row, c + s // size)
        if rows == 1:  # a loop over rows would be unrolled, and cost more than it does
            k = _eight(line, job.pitch * wide, None, element)
            _fetch_mapped(job.fetch, _along(here, AHEAD * 2), both, tail, gate)
            some = _columns_picked(job, masked, columns, element)
            _write(here, LANES, k, job.stream, both, tail, gate, some, element)
        else:
            stream = job.stream
            _map_columns(
                job, here, rows, LANES, line, stream, both, tail, gate, masked, columns, element
            )
    rest = width - whole // size
    if rest > 0:
        here, line = _along(at, whole), lines + whole * (wide // size)
        columns = _columns_selected(job, masked, row, c + width - rest)
        _map_columns(job, here, rows, rest, line, 0, both, tail, gate, masked, columns, element)


@_inline
def _is_dense(job: Any, row: int) -> Any:
    """Whether each array has its rows side by side."""
    inputs = job.dy.row == row and job.x.row == row and job.beside.row == row
    return inputs and job.through.row == row and job.out.row == row


@_inline
def _map_rows(
    job: Any,
    run: int,
    c0: int,
    c1: int,
    index: int,
    both: bool,
    tail: Any,
    gate: Any,
    masked: Any,
    weighed: Any,
    element: Any,
) -> None:
    """A chunk of some columns. Where lines begin at the same column in every row, dense rows are
    taken from that column on, each with the beginning of the next, so that only whole lines go."""
    size = _itemsize(element)
    n0, n1, _, _ = _chunk(job, index)
    row = job.columns * size
    after_tail, at_gate = _tail_lanes(job, tail, element), _gate_lanes(job, gate, element, element)
    # Rows whose lines begin at different columns are streamed one by one.
    together = job.together if not job.stream or job.out.row % 64 == 0 else 1
    n, last, c, lead = n0, n1, c0, False
    whole = row % 64 == 0 and c1 - c0 == job.columns and n1 > n0
    if job.stream and whole and _is_dense(job, row):
        last, c = n1 - 1, _head(_at(job.out, run, n0, 0), job.columns, 1, size)
        lead = c > 0
    end = job.rows + 1 if job.rest and n1 == job.rows else n1
    while n < end:
        rows, start, width = min(together, last - n), c, c1 - c0
        if lead:
            rows, start, width = 1, 0, c
        elif n == job.rows:
            rows, start, width = 1, c0, min(c1, job.rest) - c0
        elif n == last:
            rows, width = 1, c1 - c
        _map_few(
            job, run, n, rows, start, width, both, after_tail, at_gate, masked, weighed, element
        )
        n, lead = n if lead else n + rows, False


# ---- Bodies: what the order of work calls, for each element type ---------------------------------


@cache
def _body(
    name: str,
    dtype: Any,
    both: bool,
    tail: Any = None,
    gate: Any = None,
    masked: Any = None,
    weighed: Any = None,
) -> int:
    """The address of a body, compiled when it is first asked for; for a tail, a gate, a mask or
    weights, if they are not None, it is one of its own."""
    element = dtype.type(0)

    def start(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        _set_shifts(_job_at(at), run, c0, c1, element)

    def sum_planes(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        _sum_planes(_job_at(at), run, c0, c1, index, both, gate, masked, weighed, element)

    def sum_rows(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        _sum_rows(_job_at(at), run, c0, c1, index, both, gate, masked, weighed, element)

    def finish(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        _small_step(_job_at(at), run, c0, c1, both, element)

    def write_planes(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        job = _job_at(at)
        _map_planes(job, run, c0, c1, index, ahead, both, tail, gate, masked, weighed, element)

    def write_rows(at: int, run: int, c0: int, c1: int, index: int, ahead: int) -> None:
        _map_rows(_job_at(at), run, c0, c1, index, both, tail, gate, masked, weighed, element)

    bodies = (start, sum_planes, sum_rows, finish, write_planes, write_rows)
    (function,) = (body for body in bodies if body.__name__ == name)
    signature = (types.int64,) * 6, types.void
    options = {"error_model": "numpy"}
    compiled: Any = ccallback.CFunc(function, signature, locals={}, options=options)
    _cache_on_disk(compiled, function)
    compiled.compile()
    return int(compiled.address)


# ---- Order of work -------------------------------------------------------------------------------


@_inline
def _next(job: Any, block: int, end: int) -> Any:
    """The block that a thread takes after `block`; `end` if none."""
    return min(_take(job.counter) if job.shared else block + 1, end)


@_part
def _run_blocks(here: int, thread: Any, threads: int) -> None:
    """A thread's blocks of channels, each through the whole trip: the second walk starts on what
    the cache still holds, and may fetch the block that comes after."""
    job, mode = _job_at(here), _mode(USUAL_MODE)
    blocks = _blocks(job, job.block)
    end = blocks if job.shared else blocks * (thread + 1) // threads
    block = _next(job, blocks * thread // threads - 1, end)
    while block < end:
        run, c0, c1 = _block(job, block, job.block)
        _invoke(job.start, here, run, c0, c1, 0, 0)
        for index in range(job.chunks):
            _invoke(job.sum, here, run, c0, c1, index, 0)
        _invoke(job.finish, here, run, c0, c1, 0, 0)
        later = _next(job, block, end)
        ahead = (later - block) * job.block if job.lookahead and later < end else 0
        for index in range(job.chunks - 1 if job.written != NOTHING else -1, -1, -1):
            _invoke(job.write, here, run, c0, c1, index, ahead)
        block = later
    if job.stream:
        _fence()
    _mode(mode)


@_part
def _run_units(here: int, thread: Any, threads: int, writes: bool) -> None:
    """A thread's share of the chunks of all blocks, in the order in which memory has them."""
    job, mode = _job_at(here), _mode(USUAL_MODE)
    size = job.written_block if writes else job.block
    blocks = _blocks(job, size)
    units = blocks * job.chunks
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        run, c0, c1 = _block(job, unit % blocks, size)
        _invoke(job.write if writes else job.sum, here, run, c0, c1, unit // blocks, 0)
    if writes and job.stream:
        _fence()
    _mode(mode)


@_part
def _run_columns(here: int, body: int, thread: Any, threads: int) -> None:
    """A thread's share of the small step."""
    job, mode = _job_at(here), _mode(USUAL_MODE)
    share = _ceil(_ceil(job.columns, threads), LANES) * LANES
    c0, c1 = min(thread * share, job.columns), min((thread + 1) * share, job.columns)
    for run in range(job.runs if c0 < c1 else 0):
        _invoke(body, here, run, c0, c1, 0, 0)
    _mode(mode)


@_Kernel
def _run(threads: int, words: Array, scratch: Table) -> None:
    """A pass or a trip."""
    here = words.ctypes.data
    job = _job_at(here)
    width = job.runs * job.pitch * 8
    job.counter = here + (words.size - 1) * 8
    job.packed = scratch.ctypes.data
    job.work = job.packed + 8 * width
    job.sums = job.work + 4 * width
    # The small step of few channels is less work than a region of threads.
    alone = job.channels < FEW or job.columns > job.channels
    summed, written, start, finish = job.summed, job.written, job.start, job.finish
    if not job.split:
        for thread in prange(threads):
            _run_blocks(words.ctypes.data, np.int64(thread), threads)
        return
    if summed != NOTHING:
        _run_columns(here, start, 0, 1)
        for thread in prange(threads):
            _run_units(words.ctypes.data, np.int64(thread), threads, False)
    if alone:
        _run_columns(here, finish, 0, 1)
    else:
        for thread in prange(threads):
            _run_columns(words.ctypes.data, finish, np.int64(thread), threads)
    if written != NOTHING:
        for thread in prange(threads):
            _run_units(words.ctypes.data, np.int64(thread), threads, True)


# ---- One call ------------------------------------------------------------------------------------


@_compile
def _address(first: Array) -> int:
    """Where an array's first value is; `ctypes.data` of Python takes four times as long."""
    return int(first.ctypes.data)


@_compile
def _folds(samples: int, channels: int, size: int) -> bool:
    """Whether rows of memory hold several samples or tiny planes."""
    return size < LANES and (size > 1 or _fold(samples, channels, size) > 1)


def _place(a: Array) -> tuple[int, ...]:
    return (_address(a[0, 0, 0, :1]), *a.strides[:3])


def _dense(a: Any) -> Any:
    """The array, or a copy in which what shares a row lies side by side; None of None."""
    return a if a is None or a[0].flags.c_contiguous else np.ascontiguousarray(a)


def _channel_bytes(samples: int, size: int) -> int:
    """At most, of a call's tables for a channel."""
    spread, size = (size, 1) if size < LANES else (1, size)
    chunks = _cut(samples, size)[3]
    return (TABLE + 2 + spread * (8 + 4 + 2 * chunks)) * 8


def _table_of(x: Array, *rows: Any) -> Table:
    """A call's table: what is given for the channels, and room for results."""
    table = np.empty((TABLE, x.shape[0], x.shape[2]))
    for row, values in enumerate(rows):
        table[row] = values
    return table


class _Fused(NamedTuple):
    """What a call takes of a tail or a gate."""

    slope: float = 1.0
    top: float = math.inf
    """No value reaches a NaN, the top of a gate that has none."""
    beside: Array | None = None
    """The residual or, where an activation needs it, the gate's y."""
    through: Array | None = None
    """Where the gated dy goes."""
    tail: bool | None = None
    gate: bool | None = None
    gated_sums: bool | None = None
    """What there is of them: True or None, which the types of bodies tell apart."""

    def stored(self) -> _Fused:
        """The same with arrays of halves as integers."""
        return self._replace(beside=_stored(self.beside), through=_stored(self.through))

    def operands(self) -> int:
        """The arrays that it brings along."""
        return (self.beside is not None) + (self.through is not None)

    def aside(self, beside: Any, through: Any, dy: Any, out: Any) -> Any:
        """What `_plan` asks for, with places where there is no array; dy is its own gate."""
        gate, own, lets = self.gate is not None, beside is not None, through is not None
        asked: tuple[int, ...] = (int(own and not gate), int(own and gate), STORED if lets else NOT)
        asked += (_place(beside) if own else dy) + (_place(through) if lets else out)
        return asked, self.slope, self.top


def _before(tail: Tail | None) -> _Fused | None:
    """What is written, before a tail."""
    if tail is None:
        return None
    return _Fused(*tail.activation, tail.residual, tail=True)


def _after(gate: Gate | None) -> _Fused | None:
    """What is read, after a gate; without an activation y does not matter, and dy is its own."""
    if gate is None:
        return None
    (slope, top), y, through = gate
    if gate.activation == LINEAR:
        return _Fused(slope, math.nan, None, through, gate=True)
    top = math.nan if top == math.inf else top
    return _Fused(slope, top, y, through, gate=True, gated_sums=True)


def _selected_in(words: Array, selection: Selection) -> tuple[Array, ...]:
    """Tell a job what it needs of a selection; gives the arrays that it will look at."""
    runs, weights = len(selection.mask), selection.weights
    mask = selection.mask.view(np.uint8).reshape(runs, -1)
    if weights is None:
        weights = np.ones((runs, 1))
    return mask, weights, *_select(words, mask, weights, float(selection.count))


def _stored(a: Any) -> Any:
    """Halves as the integers that stand for them in kernels; None of None."""
    if a is None:
        return None
    return a.view(np.int16 if is_bfloat16(a.dtype) else np.uint16)


@cache
def _bodies(
    dtype: Any,
    inside: bool,
    summed: int,
    written: int,
    tail: Any,
    gate: Any,
    gated_sums: Any,
    masked: Any,
    weighed: Any,
) -> tuple[int, int, int, int]:
    """The addresses of what a job calls. Weights matter to moments, and to gradients through
    them."""
    family, both = "rows" if inside else "planes", written == GRADIENT
    sums_dy = summed == GRADIENTS
    sums = masked, None if sums_dy else weighed
    maps = masked, weighed if both else None
    return (
        _body("start", dtype, False) if summed else 0,
        _body("sum_" + family, dtype, sums_dy, None, gated_sums, *sums) if summed else 0,
        _body("finish", arithmetic(dtype), both),
        _body("write_" + family, dtype, both, tail, gate, *maps) if written else 0,
    )


def _team(threads: int, moved: int) -> int:
    """How many threads work on so many bytes."""
    return 1 if moved * 2 < SERIAL_BELOW * 3 else min(threads, _numba.config.NUMBA_NUM_THREADS)


def _call(
    summed: int,
    written: int,
    x: Array,
    dy: Array,
    out: Array | None,
    table: Table,
    threads: int,
    eps: float = 0.0,
    fused: _Fused | None = None,
    selection: Selection | None = None,
) -> None:
    """Run the kernel where the arrays lie, or on dense copies; without dy, dy is x."""
    if x.dtype.itemsize == 2:
        alone, x = dy is x, _stored(x)
        dy, out = x if alone else _stored(dy), _stored(out)
        fused = fused and fused.stored()
    shape, dense = x.shape, x.shape[3] < LANES and _folds(*x.shape[1:])
    inside, target = shape[3] < LANES, x if out is None else out
    if dense:
        alone, x = dy is x, _dense(x)
        dy, target = x if alone else _dense(dy), _dense(target)
    operands = 1 + (dy is not x) + (written != NOTHING) + (fused.operands() if fused else 0)
    threads = _team(threads, x.nbytes * operands)
    streamed = STREAM_ROWS if inside else STREAM_PLANES
    if summed == NOTHING:
        streamed = STREAM_MAPS
    kinds = fused[4:] if fused else (None, None, None)
    masked = None if selection is None else True
    weighed = None if selection is None or selection.weights is None else True
    asked = (threads, x.itemsize, summed, written, *shape)
    asked += (L2, TRIP, LOOKAHEAD, streamed, STREAMED_ROW, STRETCH, SPARSE, FETCH)
    asked += _bodies(x.dtype, inside, summed, written, *kinds, masked, weighed)
    x_place, out_place = _place(x), _place(target)
    dy_place = x_place if dy is x else _place(dy)
    asked += (*x_place, *dy_place, *out_place)
    aside = through = None
    if fused:
        beside, through = fused.beside, fused.through
        if dense:
            beside, through = _dense(beside), _dense(through)
        aside = fused.aside(beside, through, dy_place, out_place)
    words = np.zeros(_JOB.itemsize // 8 + 1, np.int64)
    scratch = np.empty(_plan(words, asked, aside, eps, table.reshape(TABLE, -1)))
    # What the job points at lives until it is done.
    _selected = None if selection is None else _selected_in(words, selection)
    _run(threads, words, scratch)
    if out is not None and target is not out:
        out[...] = target
    if fused and fused.through is not None and fused.through is not through:
        fused.through[...] = through


# ---- Plain calls ---------------------------------------------------------------------------------

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
_ELEMENTS = (*_DTYPES, np.dtype(np.float16))


def _plain_view(a: Any, layout: Any) -> Array | None:
    """The (G, N, C, S) view of an array as most calls have it, or None."""
    if type(a) is not np.ndarray or a.ndim < 2 or a.size == 0:
        return None
    if a.dtype not in _ELEMENTS and not is_bfloat16(a.dtype):
        return None
    flags, shape = a.flags, a.shape
    if type(layout) is not str or not (flags.c_contiguous and flags.aligned):
        return None
    if layout == "NCHW":
        n, c = shape[:2]
        s = a.size // (n * c)
    elif layout == "NHWC":
        n, c, s = a.size // shape[-1], shape[-1], 1
    else:
        return None
    if c > LANES and c * _channel_bytes(n, s) > scratch(a.nbytes, 1.0):
        return None
    return reshaped(a, (1, 1, 1, n * s) if c == 1 and s < SHORT else (1, n, c, s))


def _plain_vectors(channels: int, *vectors: Any) -> bool:
    """Whether each is one value a channel."""
    for v in vectors:
        if type(v) is not np.ndarray or v.shape != (channels,) or v.dtype not in _DTYPES:
            return False
    return True


def _plain_like(a: Any, x: Array) -> bool:
    """Whether `a` is an array like the plain array x."""
    if type(a) is not np.ndarray or a.dtype != x.dtype or a.shape != x.shape:
        return False
    flags = a.flags
    return bool(flags.c_contiguous and flags.aligned)


def _plain_output(
    out: Array | None, x: Array, *inputs: Any, apart: Sequence[Any] = ()
) -> Array | None:
    """`out` if it is like x, and apart from the inputs or one of them; or a fresh one. None may
    stand for an array that is not given."""
    if out is None:
        return np.empty(x.shape, x.dtype)
    if not _plain_like(out, x) or not out.flags.writeable:
        return None
    for a in (x, *inputs):
        if a is not out and a is not None and np.may_share_memory(out, a):
            return None
    for a in apart:
        if a is not None and np.may_share_memory(out, a):
            return None
    return out


def _plain_eps(eps: Any) -> bool:
    return type(eps) is float and 0.0 <= eps < math.inf


@_compile
def _scale(table: Table, eps: float, nan: bool) -> bool:
    """gamma / sqrt(var + eps) in gamma's place; false if var is no variance."""
    mode, valid = _mode(USUAL_MODE), True
    for channel in range(table.shape[1]):
        var = table[1, channel]
        valid &= var >= 0.0 or (nan and math.isnan(var))
        rstd = 1.0 / math.sqrt(var + eps)
        table[0, channel] *= rstd if var + eps != 0.0 else 0.0
    _mode(mode)
    return valid


@_compile
def _singles(values: Table) -> Array:
    """The values in float32."""
    mode = _mode(USUAL_MODE)
    singles = values.astype(np.float32)
    _mode(mode)
    return singles


def _given(*vectors: Any) -> list[Any]:
    return [v for v in vectors if v is not None]


def _or(vector: Any, default: float) -> Any:
    return default if vector is None else vector


def _plain_tail(activation: Activation | None, residual: Any, x: Array, view: Array) -> Any:
    """The tail of a plain call; False if it is not plain."""
    if activation is None or not (residual is None or _plain_like(residual, x)):
        return False
    return Tail(activation, None if residual is None else reshaped(residual, view.shape))


def _plain_gate(
    activation: Any, y: Any, dresidual: Any, dy: Array, view: Array, *apart: Any
) -> Any:
    """The gate of a plain call, and what it writes or None; False if it is not plain."""
    asked = of(activation)
    if asked is None or (activation is None) != (y is None):
        return False
    if not (y is None or _plain_like(y, dy)):
        return False
    if dresidual is False:
        return Gate(asked, reshaped(y, view.shape), None), None
    fresh = dresidual is True
    wanted = _plain_output(None if fresh else dresidual, dy, apart=(y, *apart))
    if dresidual is None or wanted is None:
        return False
    own = dy if y is None else y
    return Gate(asked, reshaped(own, view.shape), reshaped(wanted, view.shape)), wanted


# ---- Rows, scaled and shifted by column: in float64, from and to arrays of floats ----------------


def _rows_of(a: Array, writes: bool = False) -> Array:
    """(1, 1, R, S) as (R, S): halves, which these loops do not know, in float32."""
    rows: Array = a[0, 0]
    if a.dtype.itemsize > 2:
        return rows
    return np.empty(rows.shape, np.float32) if writes else rows.astype(np.float32)


@_inline
def _finish(y: Any, slope: float, top: float) -> Any:
    """An activation of a value."""
    below = y * slope if slope != 0.0 else 0.0
    return below if y <= 0.0 else (top if y > top else y)


@_inline
def _through(dy: Any, y: Any, slope: float, top: float) -> Any:
    """What an activation that gave y lets through."""
    below = dy * slope if slope != 0.0 else 0.0
    return below if y <= 0.0 else (0.0 if y >= top and top < math.inf else dy)


@_Kernel
def _forward_rows(
    threads: int,
    x: Array,
    residual: Array,
    mean: Table,
    rstd: Table,
    gamma: Table,
    beta: Table,
    adds: bool,
    slope: float,
    top: float,
    out: Array,
) -> None:
    """y of each row."""
    rows, size = x.shape
    for thread in prange(threads):
        mode = _mode(USUAL_MODE)
        for r in range(rows * thread // threads, rows * (thread + 1) // threads):
            place, m, s = r % len(gamma), mean[r], rstd[r]
            for c in range(size):
                y = (x[r, c] - m) * s * gamma[place, c] + beta[place, c]
                if adds:
                    y += residual[r, c]
                out[r, c] = _finish(y, slope, top)
        _mode(mode)


@_part
def _row_means(
    dy: Array, x: Array, y: Array, m: float, gamma: Table, slope: float, top: float, lanes: Table
) -> tuple[float, float]:
    """mean(gamma * dy) and mean(gamma * dy * (x - m)) of a row, in lanes that compilers may fill
    at once."""
    size = len(x)
    lanes[:] = 0.0
    for c in range(0, size - size % LANES, LANES):
        for i in range(LANES):
            scaled = _through(dy[c + i], y[c + i], slope, top) * gamma[c + i]
            lanes[0, i] += scaled
            lanes[1, i] += scaled * (x[c + i] - m)
    for c in range(size - size % LANES, size):
        scaled = _through(dy[c], y[c], slope, top) * gamma[c]
        lanes[0, c % LANES] += scaled
        lanes[1, c % LANES] += scaled * (x[c] - m)
    return lanes[0].sum() / size, lanes[1].sum() / size


@_Kernel
def _backward_rows(
    threads: int,
    dy: Array,
    x: Array,
    y: Array,
    mean: Table,
    rstd: Table,
    gamma: Table,
    slope: float,
    top: float,
    keeps: bool,
    deep: int,
    out: Array,
    through: Array,
    sums: Table,
) -> None:
    """dx of each row and, of each piece of `deep` rows, the sums of its columns."""
    rows, size = x.shape
    for thread in prange(threads):
        mode, lanes = _mode(USUAL_MODE), np.empty((2, LANES))
        pieces = len(sums)
        for piece in range(pieces * thread // threads, pieces * (thread + 1) // threads):
            for r in range(piece * deep, min((piece + 1) * deep, rows)):
                place, m, s = r % len(gamma), mean[r], rstd[r]
                row = dy[r], x[r], y[r]
                of_dy, of_xhat = _row_means(*row, m, gamma[place], slope, top, lanes)
                of_xhat *= s
                for c in range(size):
                    gated, xhat = _through(dy[r, c], y[r, c], slope, top), (x[r, c] - m) * s
                    sums[piece, 0, place, c] += gated * xhat
                    sums[piece, 1, place, c] += gated
                    if keeps:
                        through[r, c] = gated
                    out[r, c] = (gated * gamma[place, c] - of_dy - xhat * of_xhat) * s
        _mode(mode)


class NumbaBackend(Backend):
    """Compiled by Numba."""

    name = "numba"

    def __init__(self) -> None:
        self.plain_moments = self._plain_moments
        self.plain_batch_norm = self._plain_batch_norm
        self.plain_normalize = self._plain_normalize
        self.plain_backward = self._plain_backward

    def channel_bytes(self, shape: tuple[int, int, int, int]) -> int:
        return _channel_bytes(shape[1], shape[3]) + POOLED

    def moments(
        self, x: Array, threads: int, selection: Selection | None = None
    ) -> tuple[Table, Table]:
        table = _table_of(x)
        _call(MOMENTS, NOTHING, x, x, None, table, threads, selection=selection)
        return table[MEAN], table[VAR]

    def normalize(
        self,
        x: Array,
        affine: Affine,
        out: Array,
        threads: int,
        tail: Tail | None = None,
        selection: Selection | None = None,
    ) -> None:
        mean, scale, beta = affine
        self._map(x, _table_of(x, scale, beta, mean, 1.0), out, threads, tail, selection)

    def _map(
        self,
        x: Array,
        table: Table,
        out: Array,
        threads: int,
        tail: Tail | None,
        selection: Selection | None = None,
    ) -> None:
        fused = _before(tail)
        _call(NOTHING, AFFINE, x, x, out, table, threads, fused=fused, selection=selection)

    def gradient_moments(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
    ) -> tuple[Table, Table]:
        table = _table_of(x, 1.0, 0.0, mean, 1.0)
        fused = None if gate is None else _after(gate._replace(dresidual=None))
        _call(GRADIENTS, NOTHING, x, dy, None, table, threads, fused=fused, selection=selection)
        return table[DBETA], table[DGAMMA]

    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
    ) -> None:
        a, b, dy_mean, mean, rstd, rest = coefficients
        if x is None:
            written, x, table = AFFINE, dy, _table_of(dy, a, 0.0, 0.0, 1.0)
        else:
            more = 0.0 if rest is None else rest
            written, table = GRADIENT, _table_of(x, a, b, mean, rstd, dy_mean, more)
        fused = _after(gate)
        _call(NOTHING, written, x, dy, out, table, threads, fused=fused, selection=selection)

    def forward(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None = None,
        selection: Selection | None = None,
        pool: int = 1,
    ) -> tuple[Table, Table]:
        if pool > 1:
            return super().forward(x, gamma, beta, eps, out, threads, tail, selection, pool)
        table = _table_of(x, gamma, beta)
        _call(MOMENTS, AFFINE, x, x, out, table, threads, eps, _before(tail), selection)
        return table[MEAN], table[VAR]

    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        frozen: bool,
        out: Array,
        threads: int,
        gate: Gate | None = None,
        selection: Selection | None = None,
        pool: int = 1,
    ) -> tuple[Table, Table]:
        if pool > 1:
            tables, fused = (mean, var, gamma), (gate, selection, pool)
            return super().backward(dy, x, *tables, eps, frozen, out, threads, *fused)
        table, written = _table_of(x, gamma, 0.0, mean, var), AFFINE if frozen else GRADIENT
        _call(GRADIENTS, written, x, dy, out, table, threads, eps, _after(gate), selection)
        return table[DGAMMA], table[DBETA]

    @quiet
    def forward_rows(
        self,
        x: Array,
        gamma: Table,
        beta: Table,
        eps: float,
        out: Array,
        threads: int,
        tail: Tail | None = None,
    ) -> tuple[Table, Table]:
        mean, var = self.moments(x, threads)
        (slope, top), residual = (LINEAR, None) if tail is None else tail
        target = _rows_of(out, writes=True)
        arrays = _rows_of(x), target if residual is None else _rows_of(residual)
        given = mean[0], inverse_deviation(var, eps)[0], gamma, beta
        _forward_rows(
            _team(threads, 2 * x.nbytes), *arrays, *given, residual is not None, slope, top, target
        )
        if not np.may_share_memory(target, out):
            out[0, 0] = target
        return mean, var

    @quiet
    def backward_rows(
        self,
        dy: Array,
        x: Array,
        mean: Table,
        var: Table,
        gamma: Table,
        eps: float,
        out: Array,
        threads: int,
        gate: Gate | None = None,
    ) -> tuple[Table, Table]:
        (slope, top), y, through = (LINEAR, dy, None) if gate is None else gate
        target = _rows_of(out, writes=True)
        targets = target, target if through is None else _rows_of(through, writes=True)
        arrays, given = map(_rows_of, (dy, x, y)), (mean[0], inverse_deviation(var, eps)[0], gamma)
        period, size = gamma.shape
        deep = depth(period, size, mean.size)
        sums = np.zeros((-(-mean.size // deep), 2, period, size))
        keeps = through is not None
        _backward_rows(
            _team(threads, 3 * x.nbytes), *arrays, *given, slope, top, keeps, deep, *targets, sums
        )
        for target, wanted in zip(targets, (out, through), strict=True):
            if wanted is not None and not np.may_share_memory(target, wanted):
                wanted[0, 0] = target
        dgamma, dbeta = sums.sum(0)
        return dgamma, dbeta

    def plain_frozen(
        self, affine: Affine, layout: str, activation: Activation
    ) -> Callable[..., Array | None]:
        mean, scale, beta = affine
        table = np.ones((TABLE, 1, len(mean)))
        table[GAMMA], table[BETA], table[MEAN] = scale, beta, mean

        def normalize(x: Any, residual: Any, out: Any, threads: int) -> Array | None:
            view, tail = _plain_view(x, layout), None
            if view is None or view.shape[2] != len(mean):
                return None
            if activation != LINEAR or residual is not None:
                tail = _plain_tail(activation, residual, x, view)
            y = None if tail is False else _plain_output(out, x, residual)
            if y is None:
                return None
            self._map(view, table, reshaped(y, view.shape), threads, tail)
            return y

        return normalize

    def _plain_moments(self, x: Any, layout: Any, threads: int) -> tuple[Table, Table] | None:
        view = _plain_view(x, layout)
        if view is None:
            return None
        mean, var = self.moments(view, threads)
        return mean[0], var[0]

    def _plain_batch_norm(self, *arguments: Any) -> tuple[Array, Table, Table] | None:
        x, gamma, beta, eps, layout, activation, residual, out, threads = arguments
        view, parameters = _plain_view(x, layout), _given(gamma, beta)
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *parameters):
            return None
        tail = None
        if activation is not None or residual is not None:
            tail = _plain_tail(of(activation), residual, x, view)
        y = None if tail is False else _plain_output(out, x, residual, *parameters)
        if y is None:
            return None
        scale, shift = _or(gamma, 1.0), _or(beta, 0.0)
        mean, var = self.forward(view, scale, shift, eps, reshaped(y, view.shape), threads, tail)
        return y, mean[0], var[0]

    def _plain_normalize(self, *arguments: Any) -> Array | None:
        x, mean, var, gamma, beta, eps, layout, activation, residual, out, threads = arguments
        view, vectors = _plain_view(x, layout), [mean, var, *_given(gamma, beta)]
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *vectors):
            return None
        tail = None
        if activation is not None or residual is not None:
            tail = _plain_tail(of(activation), residual, x, view)
        y = None if tail is False else _plain_output(out, x, residual, *vectors)
        table = np.empty((2, view.shape[2]))
        table[0], table[1] = _or(gamma, 1.0), var
        if y is None or not _scale(table, eps, False):
            return None
        affine = Affine(mean, table[0], _or(beta, 0.0))
        self.normalize(view, affine, reshaped(y, view.shape), threads, tail)
        return y

    def _plain_backward(
        self, *arguments: Any
    ) -> tuple[Array, Array | None, Array | None, Array | None] | None:
        dy, x, mean, var, gamma, eps, layout, params, activation = arguments[:9]
        y, dresidual, frozen, out, threads = arguments[9:]
        view, vectors = _plain_view(dy, layout), [mean, var, *_given(gamma)]
        if view is None or not _plain_eps(eps) or not _plain_vectors(view.shape[2], *vectors):
            return None
        if type(params) is not bool or not (frozen or mean.dtype == var.dtype == np.float64):
            return None
        lone = frozen and not params
        if not (lone and x is None) and not _plain_like(x, dy):
            return None
        gate = through = None
        if activation is not None or y is not None or dresidual is not False:
            gated = _plain_gate(activation, y, dresidual, dy, view, x, *vectors)
            if gated is False:
                return None
            gate, through = gated
        dx = _plain_output(out, dy, x, *vectors, apart=(y, through))
        table = np.empty((2, view.shape[2]))
        table[0], table[1] = _or(gamma, 1.0), var
        if dx is None or not _scale(table, eps, not frozen):
            return None
        target = reshaped(dx, view.shape)
        if lone:
            coefficients = GradientCoefficients(table[:1], *[np.zeros((1, 1))] * 4)
            self.input_gradient(view, None, coefficients, target, threads, gate)
            return dx, None, None, through
        scale = _or(gamma, 1.0)
        x = reshaped(x, view.shape)
        sums = self.backward(view, x, mean, var, scale, eps, frozen, target, threads, gate)
        if not params:
            return dx, None, None, through
        single = (arithmetic(dy.dtype) if gamma is None else gamma.dtype) == SINGLE
        dgamma, dbeta = (_singles(s[0]) if single else s[0] for s in sums)
        return dx, dgamma, dbeta, through


_LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("default", "workqueue", "forksafe"), ()),
    **dict.fromkeys(("tbb", "safe"), ("tbb",)),
    "omp": ("omp",),
    "threadsafe": ("tbb", "omp"),
}
"""Numba's threading layers, and the libraries of which each needs one."""


def _is_there(library: str) -> bool:
    try:
        if library == "tbb":
            check: Any = threading_layers._check_tbb_version_compatible
            check()
        importlib.import_module(f"numba.np.ufunc.{library}pool")
    except ImportError:
        return False
    return True


def load() -> Backend:
    """The backend object. Numba would tell only in mid-call that it has no threads as asked for."""
    layer, order = str(_numba.config.THREADING_LAYER), _numba.config.THREADING_LAYER_PRIORITY
    libraries, variable = _LAYERS.get(layer.lower()), "NUMBA_THREADING_LAYER"
    if libraries is None:
        raise BackendError(f"{variable} is {layer!r}, expected one of {', '.join(_LAYERS)}")
    if libraries and not any(map(_is_there, libraries)):
        lacking = " or ".join(libraries)
        raise BackendError(f"{variable} is {layer!r}, but {lacking} is not here; unset it")
    if sorted(order) != ["omp", "tbb", "workqueue"]:
        given = " ".join(order)
        raise BackendError(f"{variable}_PRIORITY is {given!r}, expected tbb, omp and workqueue")
    return NumbaBackend()
