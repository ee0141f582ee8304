"""Sums, over values that lie side by side; LLVM makes vectors of these loops.

1. No loop asks the compiler to reorder: value i of what is summed goes to sum i. So the order is
   the program's, whatever the vectors of the processor. Sums are float64.
2. A loop serves planes and rows: what is one number for all values is a float, and what belongs to
   each is an array (`of`). What is None leaves no trace.
3. Indices begin at 0: Numba asks of any other whether it is negative, and LLVM makes no vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import extending

from fastbn.backends.base import Array, Table
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.halves import wide
from fastbn.backends.numba.instructions import prefetch, whole_vectors

LANES = 32
"""Sums of a plane's values: value i goes to sum i % LANES."""
SHORT = 128
"""Values of a plane; of so short ones several are summed at once."""


class ActivationParams(NamedTuple):
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
def activated(v: Any, act: ActivationParams) -> Any:
    """v <= 0 ? slope * v : min(v, top), where slope = 0 gives 0 and NaN stays NaN."""
    zero, slope, top = type(v)(0), type(v)(act.slope), type(v)(act.top)
    below = v * slope if slope != zero else zero
    above = top if v > top else v
    return below if v <= zero else above


@inline
def activation_grad(dy: Any, y: Any, act: ActivationParams) -> Any:
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
    whole_vectors()
    shift, factor, w = about
    for i in range(x.size):
        d = (wide(x[i]) - of(shift, i)) * of(factor, i)
        if masked is not None:
            d = d if seen[i] else 0.0
        if weighed is not None:
            s0[i] += w * d
            s1[i] += w * (d * d)
        else:
            s0[i] += d
            s1[i] += d * d


@inline
def add_four(x: Any, shift: Any, factor: Any, s0: Table, s1: Table, ahead: int) -> None:
    """The same of four arrays at once, so that sums are read and written a quarter as often."""
    whole_vectors()
    x0, x1, x2, x3 = x
    fetch(x0, ahead)
    fetch(x1, ahead)
    fetch(x2, ahead)
    fetch(x3, ahead)
    for i in range(x0.size):
        a, b = wide(x0[i]) - of(shift, i), wide(x1[i]) - of(shift, i)
        c, d = wide(x2[i]) - of(shift, i), wide(x3[i]) - of(shift, i)
        if x0.itemsize == 8:  # of others no square overflows, and power is 1
            a, b, c, d = a * of(factor, i), b * of(factor, i), c * of(factor, i), d * of(factor, i)
        s0[i] += (a + b) + (c + d)
        s1[i] += (a * a + b * b) + (c * c + d * d)


@inline
def dy_at(dy: Array, y: Array, act: ActivationParams, with_epilogue: Any, i: int) -> Any:
    """dy, after the activation if there is one."""
    value = wide(dy[i])
    if with_epilogue is not None:
        value = activation_grad(value, wide(y[i]), act)
    return value


@inline
def add_products(
    dys: Any,
    seen: Any,
    gamma: Any,
    mean: Any,
    act: ActivationParams,
    s0: Table,
    s1: Table,
    masked: Any,
    with_epilogue: Any,
    by_column: Any,
) -> None:
    """To two sums add dy, after the activation, and that times x - mean, of what is seen; of places
    all times gamma."""
    whole_vectors()
    dy, x, y = dys
    for i in range(x.size):
        a = dy_at(dy, y, act, with_epilogue, i)
        if by_column is not None:
            a *= gamma[i]
        b = a * (wide(x[i]) - of(mean, i))
        if masked is not None:
            a, b = a if seen[i] else 0.0, b if seen[i] else 0.0
        s0[i] += a
        s1[i] += b


@inline
def add_two(
    dys: Any,
    more: Any,
    mean: Any,
    act: ActivationParams,
    s0: Table,
    s1: Table,
    ahead: int,
    with_epilogue: Any,
) -> None:
    """The same of two triples of arrays at once."""
    whole_vectors()
    dy0, x0, y0 = dys
    dy1, x1, y1 = more
    fetch(dy0, ahead)
    fetch(x0, ahead)
    fetch(dy1, ahead)
    fetch(x1, ahead)
    for i in range(x0.size):
        a, b = dy_at(dy0, y0, act, with_epilogue, i), dy_at(dy1, y1, act, with_epilogue, i)
        s0[i] += a + b
        s1[i] += a * (wide(x0[i]) - of(mean, i)) + b * (wide(x1[i]) - of(mean, i))


@inline
def add_columns(
    dgamma: Table, dbeta: Table, dys: Any, k: Gradient, act: ActivationParams, with_epilogue: Any
) -> None:
    """To sums of each place add dy, after the activation, and that times xhat."""
    whole_vectors()
    dy, x, y = dys
    for i in range(x.size):
        value = dy_at(dy, y, act, with_epilogue, i)
        dbeta[i] += value
        dgamma[i] += value * ((wide(x[i]) - k.mean) * k.rstd)
