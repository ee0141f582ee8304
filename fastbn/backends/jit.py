"""The Numba backend: the passes and trips, compiled when first used.

1. Two families of loops. *Planes* (channels outside): a channel is N rows of S contiguous values;
   a trip reduces a few channels and writes them while they are in the cache, backwards, because
   the rows read last are nearest. *Rows* (channels inside): a row holds all channels, every column
   has its own sums, and the second pass walks the rows backwards. Rows of few values are folded,
   several samples to a row; tiny planes are rows of C * S columns.
2. Sums are float64, in `LANES` lanes: values at the same place of a row go to the same lane. The
   values are cut into chunks by shape alone, and sums of chunks are added in order. So the bits
   do not depend on threads, strides or alignment, and a trip gives the bits of its passes.
3. Moments are taken about a shift, at first the channel's first value: a constant channel gives a
   variance of exactly 0, and a large mean costs no digits. Where the shift lay far from the mean
   (an outlier came first), or float64 squares overflow, the channel is summed again about the mean
   just found (Chan, Golub & LeVeque 1983).
4. A reduction in plain Python loops stays scalar unless the compiler may reorder it, and then
   serial and parallel code would differ. So a value of type `Lanes` is one LLVM vector, spelled
   out below: the order is the program's, and every instruction set splits it into its registers.
5. Kernels take addresses and byte strides: one signature an element type, whatever the strides.
   Each is compiled twice, serial and parallel. Numba's "workqueue" threads end the process when
   entered twice at once, so one call at a time is parallel and the others run serial meanwhile.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import extending

from fastbn._caches import SERIAL_BELOW, STREAM_MAPS, STREAM_PLANES
from fastbn.backends.base import (
    Affine,
    Array,
    Backend,
    GradientCoefficients,
    Table,
    inverse_deviation,
)

LANES = 32
"""Values in one `Lanes`: two cache lines of float32."""
CHUNK = 16384
"""Values whose sums are kept apart before they are added; a multiple of LANES."""
GROUP = 8
"""Rows that the rows family takes at a time, so that sums stay in registers."""
FOLDED = 2 * LANES
"""Rows of the rows family are folded to about this many columns."""
TILE = 1 << 12
"""Bytes of neighbouring short planes that a trip walks together."""
CACHE = 1 << 19
"""Bytes of a trip's group of channels that surely stay in a core's cache."""
STREAMED_ROW = 1 << 10
"""Bytes from which a row's unaligned ends do not matter to streaming."""

F = TypeVar("F", bound=Callable[..., Any])
_numba: Any = numba  # its types are told only in part

if _numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, so nothing would be compiled; unset it")

# ---- Lanes: one LLVM vector of LANES values ------------------------------------------------------

_intrinsic: Callable[[F], Any] = extending.intrinsic
_LARGEST = float(np.finfo(np.float32).max)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


class Lanes(types.Type):
    """Numba's type of a vector of LANES values of one element type."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


class _LanesModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(lanes.element))  # type: ignore[no-untyped-call]


extending.register_model(Lanes)(_LanesModel)
_DOUBLES = Lanes(types.float64)


def _vector(element: Any) -> ir.VectorType:
    scalar = ir.FloatType() if element == types.float32 else ir.DoubleType()
    return ir.VectorType(scalar, LANES)


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


def _indices(start: int, count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT32, count), list(range(start, start + count)))


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
    bits = 32 if isinstance(data.element, ir.FloatType) else 64
    name = f"llvm.masked.{verb}.v{LANES}f{bits}.p0"
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(known or ir.Function(builder.module, kind, name), args)


def _pointer(builder: Any, address: Any, lanes: Lanes) -> Any:
    return builder.inttoptr(address, _vector(lanes.element).as_pointer())


@_intrinsic
def _itemsize(context: Any, element: Any) -> Any:
    """Bytes of one value."""
    size = ir.Constant(_INT64, element.bitwidth // 8)
    return types.int64(element), lambda context, builder, signature, args: size


@_intrinsic
def _spread(context: Any, value: Any, element: Any) -> Any:
    """The float64 `value`, rounded to `element`, in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[0], types.float64, element))

    return Lanes(element)(types.float64, element), generate


@_intrinsic
def _rounded(context: Any, value: Any, element: Any) -> Any:
    """The float64 `value`, rounded to `element`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = context.cast(builder, args[0], types.float64, element)
        return context.cast(builder, value, element, types.float64)

    return types.float64(types.float64, element), generate


@_intrinsic
def _first(context: Any, address: Any, element: Any) -> Any:
    """The value at an address, in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _vector(element).element.as_pointer())
        value = builder.load(pointer, align=element.bitwidth // 8)
        return context.cast(builder, value, element, types.float64)

    return types.float64(types.int64, element), generate


@_intrinsic
def _load(context: Any, address: Any, element: Any) -> Any:
    """LANES values from memory."""
    lanes = Lanes(element)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], lanes), align=element.bitwidth // 8)

    return lanes(types.int64, element), generate


@_intrinsic
def _load_some(context: Any, address: Any, count: Any, element: Any) -> Any:
    """`count` < LANES values from memory, and zeros."""
    lanes = Lanes(element)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _vector(element)
        mask = _mask(builder, builder.trunc(args[1], _INT32))
        align = ir.Constant(_INT32, element.bitwidth // 8)
        pointer = _pointer(builder, args[0], lanes)
        zeros = ir.Constant(data, [0.0] * LANES)
        return _masked(builder, "load", data, [pointer, align, mask, zeros], data)

    return lanes(types.int64, types.int64, element), generate


@_intrinsic
def _store(context: Any, address: Any, value: Any) -> Any:
    """All lanes to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align = value.element.bitwidth // 8
        builder.store(args[1], _pointer(builder, args[0], value), align=align)
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@_intrinsic
def _stream(context: Any, address: Any, value: Any) -> Any:
    """All lanes to memory past the cache; the address is a cache line's."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store = builder.store(args[1], _pointer(builder, args[0], value), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, value), generate


@_intrinsic
def _store_some(context: Any, address: Any, value: Any, count: Any) -> Any:
    """The first `count` < LANES lanes to memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _mask(builder, builder.trunc(args[2], _INT32))
        align = ir.Constant(_INT32, value.element.bitwidth // 8)
        pointer = _pointer(builder, args[0], value)
        data = _vector(value.element)
        _masked(builder, "store", ir.VoidType(), [args[1], pointer, align, mask], data)
        return context.get_dummy_value()

    return types.void(types.int64, value, types.int64), generate


@_intrinsic
def _widen(context: Any, value: Any) -> Any:
    """The lanes in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if value == _DOUBLES else builder.fpext(args[0], _vector(types.float64))

    return _DOUBLES(value), generate


@_intrinsic
def _narrow(context: Any, value: Any, element: Any) -> Any:
    """Float64 lanes, rounded to `element`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        same = element == types.float64
        return args[0] if same else builder.fptrunc(args[0], _vector(element))

    return Lanes(element)(_DOUBLES, element), generate


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
    """value * unit; float32 values have no squares that overflow, so for them unit is 1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if element == types.float32 else builder.fmul(args[0], args[1])

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


# ---- Compiling -----------------------------------------------------------------------------------


def _inline(function: F) -> F:
    """A part of kernels."""
    compiled: F = _numba.njit(function, error_model="numpy", forceinline=True)
    return compiled


def _compile(function: F, parallel: bool = False) -> F:
    """A kernel: compiled at its first call, and kept on disk where numba finds a place."""
    options = {"error_model": "numpy", "nogil": True, "parallel": parallel}
    try:
        compiled: F = _numba.njit(function, cache=True, **options)
    except RuntimeError:  # no directory to write to
        compiled = _numba.njit(function, **options)
    else:
        _forgive(compiled)
    return compiled


def _forgive(compiled: Any) -> None:
    """Let a kernel that cannot be kept, as on a full disk, run all the same."""
    save = compiled._cache.save_overload

    def save_if_possible(signature: Any, data: Any) -> None:
        with suppress(OSError):
            save(signature, data)

    compiled._cache.save_overload = save_if_possible


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
        threads = min(threads, _numba.config.NUMBA_NUM_THREADS)
        if threads > 1 and _Kernel._lock.acquire(blocking=False):
            try:
                if self._threads_work():
                    self._run_parallel(threads, args)
                    return
            finally:
                _Kernel._lock.release()
        self._serial(*args)

    def _run_parallel(self, threads: int, args: tuple[Any, ...]) -> None:
        before = _numba.get_num_threads()
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


# ---- Parts of both families ----------------------------------------------------------------------


@_inline
def _values(address: int, count: int, element: Any) -> Any:
    """Lanes of up to `count` values, then zeros."""
    if count >= LANES:
        return _load(address, element)
    return _load_some(address, count, element)


@_inline
def _centred(address: int, count: int, mean: Any, element: Any) -> Any:
    """Float64 lanes of up to `count` values minus `mean`, then zeros."""
    centred = _widen(_values(address, count, element)) - mean
    if count >= LANES:
        return centred
    return _keep(centred, count)


@_inline
def _put(address: int, value: Any, count: int, stream: bool) -> None:
    """Store up to `count` lanes."""
    if count < LANES:
        _store_some(address, value, count)
    elif stream:
        _stream(address, value)
    else:
        _store(address, value)


@_inline
def _head(address: int, count: int, stream: bool, size: int) -> int:
    """Values to write before streaming may begin, at the next cache line."""
    return min((-address & 63) // size, count) if stream else 0


@_inline
def _settle(
    s1: float, s2: float, count: int, shift: float, unit: float
) -> tuple[float, float, float]:
    """Mean and variance from the sums of (x - shift) * unit and of its square.

    Third, 0, or the unit with which to sum again about this mean.
    """
    offset = s1 / count
    mean = shift + offset / unit
    var = s2 / count - offset * offset
    if var < 0.0:
        var = 0.0
    again = 0.0
    if math.isfinite(s1) and not math.isfinite(s2):
        again = 2.0**-512
    elif offset * offset > 256.0 * var:
        again = 1.0
    return mean, var / unit / unit, again


@_inline
def _affine(
    mean: float, scale: float, beta: float, element: Any
) -> tuple[float, float, float, float]:
    """p, hi, scale', beta' of y = (x * p - hi) * scale' + beta', computed in `element`.

    For float32, mean * p is hi + lo with hi a float32, and lo goes into beta'. p is a power of two
    that keeps x * p - hi and scale' within range; it is 1 for most data.
    """
    p = 1.0
    if _itemsize(element) == 4 and not 1.0 <= abs(scale) <= 2.0**100:
        exponent = math.frexp(scale)[1]
        p = math.ldexp(1.0, min(max((exponent - 1) >> 1, -126), 127))
    scale /= p
    hi = _rounded(mean * p, element)
    lo = mean * p - hi
    if lo != 0.0:
        beta -= lo * scale
    if _itemsize(element) == 4 and math.isfinite(scale):
        scale = min(max(scale, -_LARGEST), _LARGEST)  # 0 * scale stays 0
    return p, hi, scale, beta


# ---- Planes: channels outside --------------------------------------------------------------------
# Channels are counted through the runs: channel = run * C + c, in tables too.


class _Strided(NamedTuple):
    """An array as kernels see it: its address, and its strides in bytes."""

    address: int
    run: int
    row: int
    channel: int


class _PlanesPlan(NamedTuple):
    """A (G, N, C, S) shape and its tasks; chunks are `height` rows, or `pieces` of one."""

    runs: int
    samples: int
    channels: int
    size: int
    height: int
    pieces: int
    chunks: int
    spans: int
    block: int
    groups: int


@_inline
def _row(x: _Strided, run: int, n: int, c: int) -> int:
    """Address of a row's first value."""
    return x.address + run * x.run + n * x.row + c * x.channel


@_inline
def _plane(x: _Strided, plan: _PlanesPlan, channel: int) -> int:
    """Address of a channel's first value."""
    return _row(x, channel // plan.channels, 0, channel % plan.channels)


@_inline
def _chunk(plan: _PlanesPlan, index: int) -> tuple[int, int, int, int]:
    """Samples n0 to n1 and values s0 to s1 of a channel's chunk."""
    n0, s0 = index // plan.pieces * plan.height, index % plan.pieces * CHUNK
    return n0, min(n0 + plan.height, plan.samples), s0, min(s0 + CHUNK, plan.size)


@_inline
def _chunk_moments(
    plane: int, stride: int, plan: _PlanesPlan, index: int, shift: float, unit: float, element: Any
) -> tuple[float, float]:
    """Sums over a chunk of d = (x - shift) * unit and of d * d."""
    size = _itemsize(element)
    n0, n1, s0, s1 = _chunk(plan, index)
    shifts, units = _spread(shift, 0.0), _spread(unit, 0.0)
    sums = squares = _spread(0.0, 0.0)
    for n in range(n0, n1):
        for s in range(s0, s1, LANES):
            d = _centred(plane + n * stride + s * size, s1 - s, shifts, element)
            d = _rescale(d, units, element)
            sums = sums + d
            squares = squares + d * d
    return _total(sums), _total(squares)


@_inline
def _chunk_gradients(
    dy: _Strided,
    x: _Strided,
    plan: _PlanesPlan,
    channel: int,
    index: int,
    mean: float,
    element: Any,
) -> tuple[float, float]:
    """Sums over a chunk of dy and of dy * (x - mean)."""
    size = _itemsize(element)
    n0, n1, s0, s1 = _chunk(plan, index)
    dy_plane, x_plane = _plane(dy, plan, channel), _plane(x, plan, channel)
    means = _spread(mean, 0.0)
    sums = products = _spread(0.0, 0.0)
    for n in range(n0, n1):
        for s in range(s0, s1, LANES):
            values = _widen(_values(dy_plane + n * dy.row + s * size, s1 - s, element))
            centred = _centred(x_plane + n * x.row + s * size, s1 - s, means, element)
            sums = sums + values
            products = products + values * centred
    return _total(sums), _total(products)


@_Kernel
def _planes_moments(
    x: _Strided, plan: _PlanesPlan, table: Table, again: Array, sums: Table, element: Any
) -> None:
    """sums[chunk, :, channel] about the shifts and units of `table`, for the channels `again`."""
    for task in prange(sums.shape[2] * plan.chunks):
        channel, index = task // plan.chunks, task % plan.chunks
        if again[channel]:
            plane, shift, unit = _plane(x, plan, channel), table[0, channel], table[1, channel]
            s1, s2 = _chunk_moments(plane, x.row, plan, index, shift, unit, element)
            sums[index, 0, channel], sums[index, 1, channel] = s1, s2


@_Kernel
def _planes_gradients(
    dy: _Strided, x: _Strided, plan: _PlanesPlan, mean: Table, sums: Table, element: Any
) -> None:
    """sums[chunk, :, channel] of dy and of dy * (x - mean)."""
    for task in prange(sums.shape[2] * plan.chunks):
        channel, index = task // plan.chunks, task % plan.chunks
        s1, s2 = _chunk_gradients(dy, x, plan, channel, index, mean[channel], element)
        sums[index, 0, channel], sums[index, 1, channel] = s1, s2


@_inline
def _write_y(
    x: int, y: int, count: int, lines: Table, channel: int, stream: bool, element: Any
) -> None:
    """y of `count` values of a channel; `lines` holds `_affine`'s numbers."""
    p, hi = _spread(lines[0, channel], element), _spread(lines[1, channel], element)
    scale, beta = _spread(lines[2, channel], element), _spread(lines[3, channel], element)
    size = _itemsize(element)
    head = _head(y, count, stream, size)
    s = 0
    while s < count:
        span = head if s < head else count - s
        value = _values(x + s * size, span, element)
        _put(y + s * size, (value * p - hi) * scale + beta, span, stream)
        s += min(span, LANES)


@_inline
def _write_dx(
    dy: int,
    x: int,
    dx: int,
    count: int,
    lines: Table,
    channel: int,
    with_x: bool,
    stream: bool,
    element: Any,
) -> None:
    """dx of `count` values of a channel; `lines` holds a, b, dy_mean, mean and rstd."""
    a, b = _spread(lines[0, channel], 0.0), _spread(lines[1, channel], 0.0)
    dy_mean, mean = _spread(lines[2, channel], 0.0), _spread(lines[3, channel], 0.0)
    rstd = _spread(lines[4, channel], 0.0)
    size = _itemsize(element)
    head = _head(dx, count, stream, size)
    s = 0
    while s < count:
        span = head if s < head else count - s
        value = _widen(_values(dy + s * size, span, element))
        if with_x:
            xhat = _centred(x + s * size, span, mean, element) * rstd
            value = a * (value - dy_mean) + b * xhat
        else:
            value = a * value
        _put(dx + s * size, _narrow(value, element), span, stream)
        s += min(span, LANES)


@_inline
def _span(plan: _PlanesPlan, task: int) -> tuple[int, int, int, int]:
    """Rows r0 to r1, counted as they lie in memory, and values s0 to s1; the last span first."""
    rows, index = plan.runs * plan.samples * plan.channels, plan.spans - 1 - task
    r0, s0 = index // plan.pieces * plan.height, index % plan.pieces * CHUNK
    return r0, min(r0 + plan.height, rows), s0, min(s0 + CHUNK, plan.size)


@_inline
def _place(plan: _PlanesPlan, row: int) -> tuple[int, int, int]:
    """Run, sample and channel of a row."""
    sample = row // plan.channels
    return sample // plan.samples, sample % plan.samples, row % plan.channels


@_inline
def _next(plan: _PlanesPlan, run: int, n: int, c: int) -> tuple[int, int, int]:
    """The place of the next row, without `_place`'s divisions."""
    if c + 1 < plan.channels:
        return run, n, c + 1
    if n + 1 < plan.samples:
        return run, n + 1, 0
    return run + 1, 0, 0


@_Kernel
def _planes_normalize(
    x: _Strided, y: _Strided, plan: _PlanesPlan, lines: Table, stream: bool, element: Any
) -> None:
    """The second pass of the forward trip, alone."""
    for task in prange(plan.spans):
        r0, r1, s0, s1 = _span(plan, task)
        at = s0 * _itemsize(element)
        run, n, c = _place(plan, r0)
        for _ in range(r0, r1):
            channel = run * plan.channels + c
            source = _row(x, run, n, c) + at
            target = _row(y, run, n, c) + at
            _write_y(source, target, s1 - s0, lines, channel, stream, element)
            run, n, c = _next(plan, run, n, c)
        if stream:
            _fence()


@_Kernel
def _planes_input_gradient(
    dy: _Strided,
    x: _Strided,
    dx: _Strided,
    plan: _PlanesPlan,
    lines: Table,
    with_x: bool,
    stream: bool,
    element: Any,
) -> None:
    """The second pass of the backward trip, alone."""
    for task in prange(plan.spans):
        r0, r1, s0, s1 = _span(plan, task)
        at = s0 * _itemsize(element)
        run, n, c = _place(plan, r0)
        for _ in range(r0, r1):
            channel = run * plan.channels + c
            source = _row(dy, run, n, c) + at
            other = _row(x, run, n, c) + at
            target = _row(dx, run, n, c) + at
            _write_dx(source, other, target, s1 - s0, lines, channel, with_x, stream, element)
            run, n, c = _next(plan, run, n, c)
        if stream:
            _fence()


@_inline
def _channel_moments(
    x: _Strided, plan: _PlanesPlan, channel: int, element: Any
) -> tuple[float, float]:
    """Mean and variance of a channel: what `NumbaBackend.moments` finds."""
    plane = _plane(x, plan, channel)
    shift, unit = _first(plane, element), 1.0
    mean = var = 0.0
    for _ in range(2):
        s1 = s2 = 0.0
        for index in range(plan.chunks):
            part1, part2 = _chunk_moments(plane, x.row, plan, index, shift, unit, element)
            s1 += part1
            s2 += part2
        mean, var, again = _settle(s1, s2, plan.samples * plan.size, shift, unit)
        if again == 0.0:
            break
        shift, unit = mean, again
    return mean, var


@_inline
def _group(plan: _PlanesPlan, task: int) -> tuple[int, int, int]:
    """The channels of a trip's task: a run, and in it from where to where."""
    blocks = -(-plan.channels // plan.block)
    c0 = task % blocks * plan.block
    return task // blocks, c0, min(c0 + plan.block, plan.channels)


@_Kernel
def _planes_forward(
    x: _Strided,
    y: _Strided,
    plan: _PlanesPlan,
    eps: float,
    table: Table,
    lines: Table,
    stream: bool,
    element: Any,
) -> None:
    """The forward trip; `table` holds gamma and beta, and receives mean and variance."""
    for task in prange(plan.groups):
        run, c0, c1 = _group(plan, task)
        for channel in range(run * plan.channels + c0, run * plan.channels + c1):
            mean, var = _channel_moments(x, plan, channel, element)
            rstd = 1.0 / math.sqrt(var + eps) if var + eps != 0.0 else 0.0
            line = _affine(mean, table[0, channel] * rstd, table[1, channel], element)
            table[2, channel], table[3, channel] = mean, var
            lines[0, channel], lines[1, channel], lines[2, channel], lines[3, channel] = line
        for n in range(plan.samples - 1, -1, -1):
            for c in range(c0, c1):
                source, target = _row(x, run, n, c), _row(y, run, n, c)
                channel = run * plan.channels + c
                _write_y(source, target, plan.size, lines, channel, stream, element)
        if stream:
            _fence()


@_Kernel
def _planes_backward(
    dy: _Strided,
    x: _Strided,
    dx: _Strided,
    plan: _PlanesPlan,
    frozen: bool,
    table: Table,
    lines: Table,
    stream: bool,
    element: Any,
) -> None:
    """The backward trip; `table` holds gamma, and receives dgamma and dbeta.

    `lines` comes with mean and rstd in its rows 3 and 4. The small step is that of
    `gradient_coefficients`, operation by operation.
    """
    count = plan.samples * plan.size
    for task in prange(plan.groups):
        run, c0, c1 = _group(plan, task)
        for channel in range(run * plan.channels + c0, run * plan.channels + c1):
            s1 = s2 = 0.0
            for index in range(plan.chunks):
                mean = lines[3, channel]
                part1, part2 = _chunk_gradients(dy, x, plan, channel, index, mean, element)
                s1 += part1
                s2 += part2
            rstd = lines[4, channel]
            a, dgamma = table[0, channel] * rstd, s2 * rstd
            lines[0, channel] = a
            lines[1, channel], lines[2, channel] = -a * (dgamma / count), s1 / count
            table[1, channel], table[2, channel] = dgamma, s1
        for n in range(plan.samples - 1, -1, -1):
            for c in range(c0, c1):
                source, other, target = _row(dy, run, n, c), _row(x, run, n, c), _row(dx, run, n, c)
                channel = run * plan.channels + c
                _write_dx(
                    source, other, target, plan.size, lines, channel, not frozen, stream, element
                )
        if stream:
            _fence()


# ---- Rows: channels inside -----------------------------------------------------------------------
# Tables are addresses of float64 [index, run, column] whose rows are padded to whole lanes.


class _RowsPlan(NamedTuple):
    """Rows of `columns` values, perhaps one more of only `rest`; tasks are `height` by `width`."""

    runs: int
    rows: int
    columns: int
    rest: int
    padded: int
    height: int
    chunks: int
    width: int
    tasks: int


@_inline
def _tile(plan: _RowsPlan, task: int) -> tuple[int, int, int, int, int, int]:
    """Run, chunk, rows r0 to r1 and columns j0 to j1 of a task."""
    tiles = -(-plan.columns // plan.width)
    run, chunk = task // (tiles * plan.chunks), task // tiles % plan.chunks
    r0, r1, columns = chunk * plan.height, min((chunk + 1) * plan.height, plan.rows), plan.columns
    if plan.rest and chunk == plan.chunks - 1:
        r0, r1, columns = plan.rows, plan.rows + 1, plan.rest
    j0 = task % tiles * plan.width
    return run, chunk, r0, r1, j0, min(j0 + plan.width, columns)


@_inline
def _address(table: int, plan: _RowsPlan, index: int, run: int) -> int:
    """Address of a table's row."""
    return table + (index * plan.runs + run) * plan.padded * 8


@_inline
def _line(table: int, plan: _RowsPlan, index: int, run: int, j: int) -> Any:
    """Lanes of a table from column j on."""
    return _load(_address(table, plan, index, run) + j * 8, 0.0)


@_Kernel
def _rows_moments(x: _Strided, plan: _RowsPlan, table: int, sums: int, element: Any) -> None:
    """sums[chunk, :, run, column] about the shifts and units of `table`."""
    size = _itemsize(element)
    for task in prange(plan.tasks):
        run, chunk, r0, r1, j0, j1 = _tile(plan, task)
        s1, s2 = _address(sums, plan, 2 * chunk, run), _address(sums, plan, 2 * chunk + 1, run)
        for start in range(r0, r1, GROUP):
            for j in range(j0, j1, LANES):
                shift, unit = _line(table, plan, 0, run, j), _line(table, plan, 1, run, j)
                total, squares = _load(s1 + j * 8, 0.0), _load(s2 + j * 8, 0.0)
                for r in range(start, min(start + GROUP, r1)):
                    d = _centred(_row(x, run, r, 0) + j * size, j1 - j, shift, element)
                    d = _rescale(d, unit, element)
                    total = total + d
                    squares = squares + d * d
                _store(s1 + j * 8, total)
                _store(s2 + j * 8, squares)


@_Kernel
def _rows_gradients(
    dy: _Strided, x: _Strided, plan: _RowsPlan, mean: int, sums: int, element: Any
) -> None:
    """sums[chunk, :, run, column] of dy and of dy * (x - mean)."""
    size = _itemsize(element)
    for task in prange(plan.tasks):
        run, chunk, r0, r1, j0, j1 = _tile(plan, task)
        s1, s2 = _address(sums, plan, 2 * chunk, run), _address(sums, plan, 2 * chunk + 1, run)
        for start in range(r0, r1, GROUP):
            for j in range(j0, j1, LANES):
                centre = _line(mean, plan, 0, run, j)
                total, products = _load(s1 + j * 8, 0.0), _load(s2 + j * 8, 0.0)
                for r in range(start, min(start + GROUP, r1)):
                    values = _widen(_values(_row(dy, run, r, 0) + j * size, j1 - j, element))
                    d = _centred(_row(x, run, r, 0) + j * size, j1 - j, centre, element)
                    total = total + values
                    products = products + values * d
                _store(s1 + j * 8, total)
                _store(s2 + j * 8, products)


@_Kernel
def _rows_normalize(
    x: _Strided, y: _Strided, plan: _RowsPlan, lines: int, stream: bool, element: Any
) -> None:
    """The second pass of the forward trip, backwards; `lines` holds `_affine`'s numbers."""
    size, height = _itemsize(element), 1 if stream else GROUP
    for task in prange(plan.tasks):
        run, _, r0, r1, j0, j1 = _tile(plan, plan.tasks - 1 - task)
        for start in range(r0, r1, height):
            head = j0 + _head(_row(y, run, start, 0) + j0 * size, j1 - j0, stream, size)
            j = j0
            while j < j1:
                span = head - j if j < head else j1 - j
                p = _narrow(_line(lines, plan, 0, run, j), element)
                hi = _narrow(_line(lines, plan, 1, run, j), element)
                scale = _narrow(_line(lines, plan, 2, run, j), element)
                beta = _narrow(_line(lines, plan, 3, run, j), element)
                for r in range(start, min(start + height, r1)):
                    value = _values(_row(x, run, r, 0) + j * size, span, element)
                    value = (value * p - hi) * scale + beta
                    _put(_row(y, run, r, 0) + j * size, value, span, stream)
                j += min(span, LANES)
        if stream:
            _fence()


@_Kernel
def _rows_input_gradient(
    dy: _Strided,
    x: _Strided,
    dx: _Strided,
    plan: _RowsPlan,
    lines: int,
    with_x: bool,
    stream: bool,
    element: Any,
) -> None:
    """The second pass of the backward trip, backwards; `lines` as `_write_dx` has it."""
    size, height = _itemsize(element), 1 if stream else GROUP
    for task in prange(plan.tasks):
        run, _, r0, r1, j0, j1 = _tile(plan, plan.tasks - 1 - task)
        for start in range(r0, r1, height):
            head = j0 + _head(_row(dx, run, start, 0) + j0 * size, j1 - j0, stream, size)
            j = j0
            while j < j1:
                span = head - j if j < head else j1 - j
                a, b = _line(lines, plan, 0, run, j), _line(lines, plan, 1, run, j)
                dy_mean, mean = _line(lines, plan, 2, run, j), _line(lines, plan, 3, run, j)
                rstd = _line(lines, plan, 4, run, j)
                for r in range(start, min(start + height, r1)):
                    value = _widen(_values(_row(dy, run, r, 0) + j * size, span, element))
                    if with_x:
                        d = _centred(_row(x, run, r, 0) + j * size, span, mean, element)
                        value = a * (value - dy_mean) + b * (d * rstd)
                    else:
                        value = a * value
                    _put(_row(dx, run, r, 0) + j * size, _narrow(value, element), span, stream)
                j += min(span, LANES)
        if stream:
            _fence()


# ---- The small step ------------------------------------------------------------------------------


@_compile
def _merge(sums: Table) -> Table:
    """The sums of chunks, added in order."""
    merged = np.zeros(sums.shape[1:])
    for chunk in range(sums.shape[0]):
        merged += sums[chunk]
    return merged


@_compile
def _gather(merged: Table, owners: Array, channels: int) -> Table:
    """The sums of channels, from [kind, run, column]; columns belong to the `owners`."""
    kinds, runs, _ = merged.shape
    sums = np.zeros((kinds, runs, channels))
    for kind in range(kinds):
        for run in range(runs):
            for column in range(owners.size):
                sums[kind, run, owners[column]] += merged[kind, run, column]
    return sums


@_compile
def _settle_all(sums: Table, count: int, table: Table) -> Table:
    """`_settle` for all channels: from shifts and units to means, variances and units again."""
    found = np.empty((3, sums.shape[1]))
    for channel in range(sums.shape[1]):
        shift, unit = table[0, channel], table[1, channel]
        mean, var, again = _settle(sums[0, channel], sums[1, channel], count, shift, unit)
        found[0, channel], found[1, channel], found[2, channel] = mean, var, again
    return found


@_compile
def _affine_all(affine: Table, element: Any) -> Table:
    """`_affine` for all channels; `affine` holds mean, scale and beta."""
    lines = np.empty((4, affine.shape[1]))
    for channel in range(affine.shape[1]):
        mean, scale, beta = affine[0, channel], affine[1, channel], affine[2, channel]
        line = _affine(mean, scale, beta, element)
        lines[0, channel], lines[1, channel], lines[2, channel], lines[3, channel] = line
    return lines


# ---- One call ------------------------------------------------------------------------------------


def _vectors(*tables: Table) -> Table:
    """(G, C) tables as the rows of one fresh array."""
    return np.array([table.ravel() for table in tables])


def _strided(x: Array) -> _Strided:
    return _Strided(x.ctypes.data, *x.strides[:3])


def _streams(row: int, least: int, out: Array, *inputs: Array) -> bool:
    """Whether `out`, in rows of `row` bytes, goes past the cache: never in place, and only if
    the operands have at least so many bytes."""
    if out.nbytes * (1 + len(inputs)) < least or row < STREAMED_ROW:
        return False
    return all(out.ctypes.data != array.ctypes.data for array in inputs)


class _Planes:
    """A call on channels outside."""

    def __init__(self, x: Array, threads: int) -> None:
        runs, n, channels, s = x.shape
        self.count, self.row = n * s, s * x.itemsize
        self.element = x.dtype.type(0)
        self.threads = threads if x.nbytes >= SERIAL_BELOW else 1
        height, pieces = max(1, CHUNK // s), -(-s // CHUNK)
        chunks, spans = -(-n // height) * pieces, -(-runs * n * channels // height) * pieces
        block = min(TILE // self.row, CACHE // (n * self.row), channels // self.threads)
        block = max(1, block)
        groups = runs * -(-channels // block)
        self.plan = _PlanesPlan(runs, n, channels, s, height, pieces, chunks, spans, block, groups)

    @property
    def splits(self) -> bool:
        """Whether a trip would leave threads idle, so that its two passes run in turn."""
        groups = self.plan.groups
        return -(-groups // self.threads) * self.threads * 5 > groups * 6

    def moments(self, x: Array, table: Table, again: Array) -> Table:
        """Sums about the shifts and units of `table`, for the channels `again`."""
        sums = np.zeros((self.plan.chunks, 2, table.shape[1]))
        _planes_moments(self.threads, _strided(x), self.plan, table, again, sums, self.element)
        return _merge(sums)

    def gradients(self, dy: Array, x: Array, mean: Table) -> Table:
        """Sums of dy and of dy * (x - mean)."""
        sums = np.zeros((self.plan.chunks, 2, mean.size))
        views = _strided(dy), _strided(x)
        _planes_gradients(self.threads, *views, self.plan, mean, sums, self.element)
        return _merge(sums)

    def normalize(self, x: Array, lines: Table, out: Array) -> None:
        """The second pass of the forward trip."""
        stream = _streams(self.row, STREAM_MAPS, out, x)
        views = _strided(x), _strided(out)
        _planes_normalize(self.threads, *views, self.plan, lines, stream, self.element)

    def input_gradient(self, dy: Array, x: Array | None, lines: Table, out: Array) -> None:
        """The second pass of the backward trip."""
        with_x, x = x is not None, dy if x is None else x
        stream = _streams(self.row, STREAM_MAPS, out, dy, x)
        views = _strided(dy), _strided(x), _strided(out)
        _planes_input_gradient(self.threads, *views, self.plan, lines, with_x, stream, self.element)

    def forward(
        self, x: Array, gamma: Table, beta: Table, eps: float, out: Array
    ) -> tuple[Table, Table]:
        """The forward trip."""
        table, lines = np.empty((4, gamma.size)), np.empty((4, gamma.size))
        table[0], table[1] = gamma.ravel(), beta.ravel()
        stream = _streams(self.row, STREAM_PLANES, out, x)
        views = _strided(x), _strided(out)
        _planes_forward(self.threads, *views, self.plan, eps, table, lines, stream, self.element)
        return table[2].reshape(gamma.shape), table[3].reshape(gamma.shape)

    def backward(
        self, dy: Array, x: Array, mean: Table, rstd: Table, gamma: Table, frozen: bool, out: Array
    ) -> tuple[Table, Table]:
        """The backward trip."""
        table, lines = np.empty((3, gamma.size)), np.empty((5, gamma.size))
        table[0], lines[3], lines[4] = gamma.ravel(), mean.ravel(), rstd.ravel()
        stream = _streams(self.row, STREAM_PLANES, out, dy, x)
        views = _strided(dy), _strided(x), _strided(out)
        _planes_backward(
            self.threads, *views, self.plan, frozen, table, lines, stream, self.element
        )
        return table[1].reshape(gamma.shape), table[2].reshape(gamma.shape)


class _Rows:
    """A call on channels inside, or on tiny planes."""

    def __init__(self, x: Array, threads: int) -> None:
        runs, n, channels, s = self.shape = x.shape
        self.count = n * s
        self.element = x.dtype.type(0)
        self.threads = threads if x.nbytes >= SERIAL_BELOW else 1
        fold = max(1, FOLDED // (channels * s))
        columns = fold * channels * s
        rows, rest = divmod(n, fold)
        height = max(64, CHUNK // columns)
        chunks = -(-rows // height) + (rest > 0)
        tiles = -(-4 * self.threads // (runs * chunks)) if self.threads > 1 else 1
        width = -(-columns // (tiles * LANES)) * LANES
        tasks, padded = runs * chunks * -(-columns // width), (columns // LANES + 2) * LANES
        self.plan = _RowsPlan(
            runs, rows, columns, rest * channels * s, padded, height, chunks, width, tasks
        )
        self.packed = columns > channels
        self.owners = np.arange(columns) // s % channels if self.packed else None

    def moments(self, x: Array, table: Table, again: Array) -> Table:
        """Sums about the shifts and units of `table`; not `again`, they come out the same."""
        tables, sums, x = self._columns(table), self._sums(), self._source(x)
        addresses = tables.ctypes.data, sums.ctypes.data
        _rows_moments(self.threads, self._strided(x), self.plan, *addresses, self.element)
        return self._merged(sums)

    def gradients(self, dy: Array, x: Array, mean: Table) -> Table:
        """Sums of dy and of dy * (x - mean)."""
        means, sums, dy, x = self._columns(mean), self._sums(), self._source(dy), self._source(x)
        plan = self.plan, means.ctypes.data, sums.ctypes.data
        _rows_gradients(self.threads, self._strided(dy), self._strided(x), *plan, self.element)
        return self._merged(sums)

    def normalize(self, x: Array, lines: Table, out: Array) -> None:
        """The second pass of the forward trip."""
        tables, x, target = self._columns(lines), self._source(x), self._target(out)
        stream = _streams(self.plan.width * x.itemsize, STREAM_MAPS, target, x)
        plan = self.plan, tables.ctypes.data, stream
        _rows_normalize(self.threads, self._strided(x), self._strided(target), *plan, self.element)
        if target is not out:
            out[...] = target

    def input_gradient(self, dy: Array, x: Array | None, lines: Table, out: Array) -> None:
        """The second pass of the backward trip."""
        tables, dy, target = self._columns(lines), self._source(dy), self._target(out)
        with_x, x = x is not None, dy if x is None else self._source(x)
        stream = _streams(self.plan.width * x.itemsize, STREAM_MAPS, target, dy, x)
        views = self._strided(dy), self._strided(x), self._strided(target)
        plan = self.plan, tables.ctypes.data, with_x, stream
        _rows_input_gradient(self.threads, *views, *plan, self.element)
        if target is not out:
            out[...] = target

    def _walks(self, x: Array) -> bool:
        """Whether `x` can be walked where it lies: what shares a row must lie side by side."""
        return not self.packed or bool(x[0].flags.c_contiguous)

    def _source(self, x: Array) -> Array:
        return x if self._walks(x) else np.ascontiguousarray(x)

    def _target(self, out: Array) -> Array:
        return out if self._walks(out) else np.empty(self.shape, out.dtype)

    def _strided(self, x: Array) -> _Strided:
        row = self.plan.columns * x.itemsize if self.packed else x.strides[1]
        return _Strided(x.ctypes.data, x.strides[0], row, 0)

    def _columns(self, vectors: Table) -> Table:
        """Vectors over all channels as tables over the columns."""
        vectors = vectors.reshape(-1, self.shape[0], self.shape[2])
        tables = np.zeros((*vectors.shape[:2], self.plan.padded))
        owners = self.owners
        tables[:, :, : self.plan.columns] = vectors if owners is None else vectors[:, :, owners]
        return tables

    def _sums(self) -> Table:
        return np.zeros((self.plan.chunks, 2, self.plan.runs, self.plan.padded))

    def _merged(self, sums: Table) -> Table:
        """The sums of all channels, from those of chunks and columns."""
        merged = _merge(sums.reshape(self.plan.chunks, 2 * self.plan.runs, -1))
        merged = merged.reshape(2, self.plan.runs, -1)
        if self.owners is None:
            merged = np.ascontiguousarray(merged[:, :, : self.plan.columns])
            return merged.reshape(2, -1)
        return _gather(merged, self.owners, self.shape[2]).reshape(2, -1)


# ---- The backend ---------------------------------------------------------------------------------


class NumbaBackend(Backend):
    """Compiled by Numba."""

    name = "numba"

    def moments(self, x: Array, threads: int) -> tuple[Table, Table]:
        walk = _walk(x, threads)
        first = x[:, 0, :, 0].astype(np.float64)
        table = _vectors(first, np.ones_like(first))
        found = _settle_all(
            walk.moments(x, table, np.ones(first.size, np.bool_)), walk.count, table
        )
        again = found[2] != 0
        if again.any():
            table = np.where(again, found[::2], table)
            second = _settle_all(walk.moments(x, table, again), walk.count, table)
            found = np.where(again, second, found)
        return found[0].reshape(first.shape), found[1].reshape(first.shape)

    def normalize(self, x: Array, affine: Affine, out: Array, threads: int) -> None:
        walk = _walk(x, threads)
        walk.normalize(x, _affine_all(_vectors(*affine), walk.element), out)

    def gradient_moments(
        self, dy: Array, x: Array, mean: Table, threads: int
    ) -> tuple[Table, Table]:
        sums = _walk(x, threads).gradients(dy, x, mean.ravel())
        return sums[0].reshape(mean.shape), sums[1].reshape(mean.shape)

    def input_gradient(
        self,
        dy: Array,
        x: Array | None,
        coefficients: GradientCoefficients,
        out: Array,
        threads: int,
    ) -> None:
        _walk(dy, threads).input_gradient(dy, x, _vectors(*coefficients), out)

    def forward(
        self, x: Array, gamma: Table, beta: Table, eps: float, out: Array, threads: int
    ) -> tuple[Table, Table]:
        walk = _walk(x, threads)
        if isinstance(walk, _Rows) or walk.splits:
            return super().forward(x, gamma, beta, eps, out, threads)
        return walk.forward(x, gamma, beta, eps, out)

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
    ) -> tuple[Table, Table]:
        walk = _walk(x, threads)
        if isinstance(walk, _Rows) or walk.splits:
            return super().backward(dy, x, mean, var, gamma, eps, frozen, out, threads)
        return walk.backward(dy, x, mean, inverse_deviation(var, eps), gamma, frozen, out)


def load() -> Backend:
    """The backend object."""
    return NumbaBackend()


def _walk(x: Array, threads: int) -> _Planes | _Rows:
    """The family of loops for `x`: by its shape alone, as the bits depend on it."""
    return _Rows(x, threads) if x.shape[3] < LANES // 2 else _Planes(x, threads)
