"""The inner loops, over values that lie side by side; LLVM makes vectors of them.

1. No loop asks the compiler to reorder: value i of what is summed goes to sum i. So the order is
   the program's, whatever the vectors of the processor.
2. Sums are float64, and so is all arithmetic of float64 arrays. Of others, y and dx are computed in
   float32 where their coefficients are in its range, and else in float64 too.
3. What is written goes by way of a tile on the stack: so `out` may be one of the inputs, whole
   cache lines can go past the caches, and no loop has to ask whether it reads what it writes.
4. Indices begin at 0: Numba asks of any other whether it is negative, and LLVM makes no vectors.
5. A loop serves planes and rows: what is one number for all values is a float, and what belongs to
   each is an array (`of`). What is None leaves no trace.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import extending

from fastbn.backends.base import Array, Table
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.instructions import (
    array,
    narrow,
    part,
    prefetch,
    single,
    stream_line,
    wide,
)

LANES = 32
"""Sums of a plane's values: value i goes to sum i % LANES."""
SHORT = 128
"""Values of a plane; of so short ones several are summed at once."""
TILE = 512
ROOM = 2 * TILE
"""Values of a tile, and of one that takes several short planes or rows."""


class Slopes(NamedTuple):
    """An activation: slope * v below 0, v, and `top` above that."""

    slope: float
    top: float


class Gradient(NamedTuple):
    """dx = (dy - dy_mean) * a + b * xhat + rest, xhat = (x - mean) * rstd."""

    a: Any
    dy_mean: Any
    mean: Any
    rstd: Any
    b: Any
    rest: Any


def of(value: Any, i: int) -> Any:
    """What belongs to value i."""


@extending.overload(of, strict=False)
def _of(value: Any, i: int) -> Any:
    return (lambda value, i: value[i]) if isinstance(value, types.Array) else lambda value, i: value


@inline
def activated(v: Any, act: Slopes) -> Any:
    """v <= 0 ? slope * v : min(v, top), where slope = 0 gives 0 and NaN stays NaN."""
    zero, slope, top = type(v)(0), type(v)(act.slope), type(v)(act.top)
    below = v * slope if slope != zero else zero
    above = top if v > top else v
    return below if v <= zero else above


@inline
def gated(dy: Any, y: Any, act: Slopes) -> Any:
    """dy times the slope of the activation where it gave y; a top that is NaN is none."""
    zero, slope, top = type(dy)(0), type(dy)(act.slope), type(dy)(act.top)
    below = dy * slope if slope != zero else zero
    above = zero if y >= top else dy
    return below if y <= zero else above


@inline
def clear(sums: Table) -> None:
    for i in range(sums.size):
        sums[i] = 0.0


@inline
def fetch(x: Array, ahead: int) -> None:
    """Fetch as many values as x has, so many bytes further, if any."""
    address = np.int64(x.ctypes.data) + ahead
    end = address + (x.size * x.itemsize if ahead else 0)
    while address < end:
        prefetch(address)
        address += 64


@inline
def add_moments(
    x: Array, seen: Any, about: Any, s0: Table, s1: Table, masked: Any, weighed: Any
) -> None:
    """To two sums add d = (x - shift) * power and d * d, weighed, of what is seen."""
    shift, power, w = about
    for i in range(x.size):
        d = (wide(x[i]) - of(shift, i)) * of(power, i)
        if masked is not None:
            d = d if seen[i] else 0.0
        if weighed is not None:
            s0[i] += w * d
            s1[i] += w * (d * d)
        else:
            s0[i] += d
            s1[i] += d * d


@inline
def add_four(x: Any, shift: Any, power: Any, s0: Table, s1: Table, ahead: int) -> None:
    """The same of four arrays at once, so that sums are read and written a quarter as often."""
    x0, x1, x2, x3 = x
    fetch(x0, ahead)
    fetch(x1, ahead)
    fetch(x2, ahead)
    fetch(x3, ahead)
    for i in range(x0.size):
        a, b = wide(x0[i]) - of(shift, i), wide(x1[i]) - of(shift, i)
        c, d = wide(x2[i]) - of(shift, i), wide(x3[i]) - of(shift, i)
        if x0.itemsize == 8:  # of others no square overflows, and power is 1
            a, b, c, d = a * of(power, i), b * of(power, i), c * of(power, i), d * of(power, i)
        s0[i] += (a + b) + (c + d)
        s1[i] += (a * a + b * b) + (c * c + d * d)


@inline
def _through(dy: Array, y: Array, act: Slopes, fused: Any, i: int) -> Any:
    """dy, after the activation if there is one."""
    value = wide(dy[i])
    if fused is not None:
        value = gated(value, wide(y[i]), act)
    return value


@inline
def add_products(
    dys: Any,
    seen: Any,
    gamma: Any,
    mean: Any,
    act: Slopes,
    s0: Table,
    s1: Table,
    masked: Any,
    fused: Any,
    placed: Any,
) -> None:
    """To two sums add dy, after the activation, and that times x - mean, of what is seen; of places
    all times gamma."""
    dy, x, y = dys
    for i in range(x.size):
        a = _through(dy, y, act, fused, i)
        if placed is not None:
            a *= gamma[i]
        b = a * (wide(x[i]) - of(mean, i))
        if masked is not None:
            a, b = a if seen[i] else 0.0, b if seen[i] else 0.0
        s0[i] += a
        s1[i] += b


@inline
def add_two(
    dys: Any, more: Any, mean: Any, act: Slopes, s0: Table, s1: Table, ahead: int, fused: Any
) -> None:
    """The same of two triples of arrays at once."""
    dy0, x0, y0 = dys
    dy1, x1, y1 = more
    fetch(dy0, ahead)
    fetch(x0, ahead)
    fetch(dy1, ahead)
    fetch(x1, ahead)
    for i in range(x0.size):
        a, b = _through(dy0, y0, act, fused, i), _through(dy1, y1, act, fused, i)
        s0[i] += a + b
        s1[i] += a * (wide(x0[i]) - of(mean, i)) + b * (wide(x1[i]) - of(mean, i))


@inline
def write_y(
    out: Array,
    x: Array,
    residual: Array,
    affine: Any,
    places: Any,
    act: Slopes,
    adds: int,
    fused: Any,
    placed: Any,
) -> None:
    """y = (x - mean) * scale + beta, or (x - mean) * scale * gamma + beta of places; then a
    residual, if one adds, and the activation."""
    mean, scale, beta = affine
    gamma, shift = places
    for i in range(x.size):
        v = (wide(x[i]) - of(mean, i)) * of(scale, i)
        if placed is not None:
            v = v * gamma[i] + shift[i]
        else:
            v += of(beta, i)
        if fused is not None:
            v = activated(v + wide(residual[i]) if adds else v, act)
        out[i] = narrow(v, out[i])


@inline
def write_dx(
    out: Array, dys: Any, gamma: Any, k: Gradient, w: float, act: Slopes, fused: Any, placed: Any
) -> None:
    """dx; of a sample that weighs w, what comes through the statistics is weighed."""
    dy, x, y = dys
    for i in range(x.size):
        a = _through(dy, y, act, fused, i)
        if placed is not None:
            a *= gamma[i]
        xhat = (wide(x[i]) - of(k.mean, i)) * of(k.rstd, i)
        dx = (a - w * of(k.dy_mean, i)) * of(k.a, i) + w * (of(k.b, i) * xhat)
        out[i] = narrow(dx + of(k.rest, i), out[i])


@inline
def write_scaled(out: Array, dys: Any, a: Any, act: Slopes, fused: Any) -> None:
    """a * dy after the activation: dx by statistics that are fixed, or what the residual gets."""
    dy, _, y = dys
    for i in range(out.size):
        out[i] = narrow(_through(dy, y, act, fused, i) * of(a, i), out[i])


@inline
def is_usual(a: Any, mean: Any, rest: Any) -> bool:
    """Whether float32 keeps (x - mean) * a + rest in range for all x, as far as the result is."""
    size = abs(a)
    return bool(1e-18 < size < 1e18 or size == 0.0) and abs(mean) < 1e18 and abs(rest) < 1e36


@inline
def write_y_single(
    out: Array, x: Array, residual: Array, affine: Any, act: Any, adds: int, fused: Any
) -> None:
    """y in float32, of coefficients that are; `rest` holds what the rounded mean has lost."""
    mean, scale, rest = affine
    for i in range(x.size):
        v = (single(x[i]) - of(mean, i)) * of(scale, i) + of(rest, i)
        if fused is not None:
            v = activated(v + single(residual[i]) if adds else v, act)
        out[i] = narrow(v, out[i])


@inline
def write_dx_single(out: Array, dys: Any, k: Any, act: Any, fused: Any) -> None:
    """dx = (dy - dy_mean) * a + (x - mean) * b + rest in float32, in the same way."""
    dy, x, y = dys
    a, dy_mean, mean, b, rest = k
    for i in range(x.size):
        value = single(dy[i])
        if fused is not None:
            value = gated(value, single(y[i]), act)
        dx = (value - of(dy_mean, i)) * of(a, i) + (single(x[i]) - of(mean, i)) * of(b, i)
        out[i] = narrow(dx + of(rest, i), out[i])


@inline
def single_affine(mean: float, scale: float, beta: float, itemsize: int) -> Any:
    """The coefficients of y in float32, and whether that does."""
    near = np.float32(mean)
    rest = beta - (mean - near) * scale
    usual = itemsize < 8 and is_usual(scale, mean, rest)
    return (near, np.float32(scale), np.float32(rest)), usual


@inline
def single_gradient(k: Gradient, itemsize: int) -> Any:
    """The coefficients of dx in float32, and whether that does."""
    near, near_dy, b = np.float32(k.mean), np.float32(k.dy_mean), k.b * k.rstd
    rest = k.rest - (k.dy_mean - near_dy) * k.a - (k.mean - near) * b
    usual = is_usual(k.a, k.dy_mean, rest) and is_usual(b, k.mean, rest) and itemsize < 8
    return (np.float32(k.a), near_dy, near, np.float32(b), np.float32(rest)), usual


@inline
def add_columns(
    dgamma: Table, dbeta: Table, dys: Any, k: Gradient, act: Slopes, fused: Any
) -> None:
    """To sums of each place add dy, after the activation, and that times xhat."""
    dy, x, y = dys
    for i in range(x.size):
        through = _through(dy, y, act, fused, i)
        dbeta[i] += through
        dgamma[i] += through * ((wide(x[i]) - k.mean) * k.rstd)


@inline
def put(to: int, tile: Array, count: int, stream: int, like: Any) -> None:
    """A tile to memory; its whole cache lines past the caches, if it shall be streamed."""
    done, size = 0, tile.itemsize
    if stream:
        first = (-to & 63) // size
        done = first if first < count else count
        _copy(array(to, (done,), like), tile)
        while count - done >= 64 // size:
            stream_line(to + done * size, tile, done)
            done += 64 // size
    _copy(array(to + done * size, (count - done,), like), part(tile, done, count - done))


@inline
def _copy(out: Array, values: Array) -> None:
    for i in range(out.size):
        out[i] = values[i]
