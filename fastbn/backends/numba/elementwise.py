"""y and dx, of values that lie side by side; LLVM makes vectors of these loops.

1. What is written goes by way of a tile on the stack: so `out` may be one of the inputs, whole
   cache lines can go past the caches, and no loop has to ask whether it reads what it writes.
2. Arithmetic of float64 arrays is float64. Of others it is float32 where a channel's coefficients
   are in its range, and else float64, too; a result is rounded once more when it is stored.
3. What `rest` has of float32 coefficients is what the mean lost when it was rounded: x - mean is
   exact near the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.backends.base import Array
from fastbn.backends.numba.compiling import inline
from fastbn.backends.numba.halves import narrow, single, wide
from fastbn.backends.numba.instructions import array, part, stream_line, whole_vectors
from fastbn.backends.numba.reduce import (
    ActivationParams,
    Gradient,
    activated,
    activation_grad,
    dy_at,
    of,
)

TILE = 512
ROOM = 2 * TILE
"""Values of a tile, and of one that takes several short planes or rows."""


@inline
def write_y(
    out: Array,
    x: Array,
    residual: Array,
    affine: Any,
    places: Any,
    act: ActivationParams,
    has_residual: int,
    with_epilogue: Any,
    by_column: Any,
) -> None:
    """y = (x - mean) * scale + beta, or (x - mean) * scale * gamma + beta of places; then a
    residual, if there is one, and the activation."""
    whole_vectors()
    mean, scale, beta = affine
    gamma, shift = places
    for i in range(x.size):
        v = (wide(x[i]) - of(mean, i)) * of(scale, i)
        if by_column is not None:
            v = v * gamma[i] + shift[i]
        else:
            v += of(beta, i)
        if with_epilogue is not None:
            v = activated(v + wide(residual[i]) if has_residual else v, act)
        out[i] = narrow(v, out[i])


@inline
def write_dx(
    out: Array,
    dys: Any,
    gamma: Any,
    k: Gradient,
    w: float,
    act: ActivationParams,
    with_epilogue: Any,
    by_column: Any,
) -> None:
    """dx; of a sample that weighs w, what comes through the statistics is weighed."""
    whole_vectors()
    dy, x, y = dys
    for i in range(x.size):
        a = dy_at(dy, y, act, with_epilogue, i)
        if by_column is not None:
            a *= gamma[i]
        xhat = (wide(x[i]) - of(k.mean, i)) * of(k.rstd, i)
        dx = (a - w * of(k.dy_mean, i)) * of(k.a, i) + w * (of(k.b, i) * xhat)
        out[i] = narrow(dx + of(k.rest, i), out[i])


@inline
def write_scaled(out: Array, dys: Any, a: Any, act: ActivationParams, with_epilogue: Any) -> None:
    """a * dy after the activation: dx by statistics that are fixed, or what the residual gets."""
    whole_vectors()
    dy, _, y = dys
    for i in range(out.size):
        out[i] = narrow(dy_at(dy, y, act, with_epilogue, i) * of(a, i), out[i])


@inline
def is_usual(a: Any, mean: Any, rest: Any) -> Any:
    """Whether float32 keeps (x - mean) * a + rest in range for all x, as far as the result is: the
    factors are normal numbers, and the largest x less the mean rounds to itself."""
    size = abs(a)
    scales = (size > 1e-36) & (size < 1e36) | (size == 0.0)
    return scales & (abs(mean) < 1e30) & (abs(rest) < 1e36)


@inline
def write_y_single(
    out: Array,
    x: Array,
    residual: Array,
    affine: Any,
    act: Any,
    has_residual: int,
    with_epilogue: Any,
) -> None:
    """y in float32, of coefficients that are; `rest` holds what the rounded mean has lost."""
    whole_vectors()
    mean, scale, rest = affine
    for i in range(x.size):
        v = (single(x[i]) - of(mean, i)) * of(scale, i) + of(rest, i)
        if with_epilogue is not None:
            v = activated(v + single(residual[i]) if has_residual else v, act)
        out[i] = narrow(v, out[i])


@inline
def write_dx_single(out: Array, dys: Any, k: Any, act: Any, with_epilogue: Any) -> None:
    """dx = (dy - dy_mean) * a + (x - mean) * b + rest in float32, in the same way."""
    whole_vectors()
    dy, x, y = dys
    a, dy_mean, mean, b, rest = k
    for i in range(x.size):
        value = single(dy[i])
        if with_epilogue is not None:
            value = activation_grad(value, single(y[i]), act)
        dx = (value - of(dy_mean, i)) * of(a, i) + (single(x[i]) - of(mean, i)) * of(b, i)
        out[i] = narrow(dx + of(rest, i), out[i])


@inline
def single_affine(mean: float, scale: float, beta: float, itemsize: int) -> Any:
    """The coefficients of y in float32, and whether that does."""
    near = np.float32(mean)
    rest = beta - (mean - near) * scale
    usual = is_usual(scale, mean, rest) & (itemsize < 8)
    return (near, np.float32(scale), np.float32(rest)), usual


@inline
def single_gradient(k: Gradient, itemsize: int) -> Any:
    """The coefficients of dx in float32, and whether that does."""
    near, near_dy, b = np.float32(k.mean), np.float32(k.dy_mean), k.b * k.rstd
    rest = k.rest - (k.dy_mean - near_dy) * k.a - (k.mean - near) * b
    usual = is_usual(k.a, k.dy_mean, rest) & is_usual(b, k.mean, rest) & (itemsize < 8)
    return (np.float32(k.a), near_dy, near, np.float32(b), np.float32(rest)), usual


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
