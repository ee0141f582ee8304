"""Layer norm over the last axis, and RMS norm: each row by its own statistics.

1. In (N, L, C), as of a transformer's tokens, or any (..., C) every row of C values along the last
   axis is normalized by itself; gamma and beta are of the C columns.
2. A transformer normalizes x + skip, and uses that sum again. Both in one call save a pass over
   memory: the sum is written, and normalized while the cache holds it. On the way back, what
   reaches the sum by its other uses is added to dx.
3. RMS norm subtracts no mean: ``xhat = x / sqrt(mean(x**2) + eps)``.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastbn import _run, checks
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.backends.base import quiet
from fastbn.config import current
from fastbn.layouts import LAST_AXIS
from fastbn.results import (
    Gradients,
    ResidualGradients,
    RMSGradients,
    RMSNormResult,
    SkipRMSNormResult,
    named,
)

Array = NDArray[Any]


@overload
def rms_norm(
    x: Array,
    gamma: Array | None = ...,
    *,
    eps: float = ...,
    skip: None = ...,
    where: Array | None = ...,
    out: Array | None = ...,
) -> RMSNormResult: ...
@overload
def rms_norm(
    x: Array,
    gamma: Array | None = ...,
    *,
    eps: float = ...,
    skip: Array,
    where: Array | None = ...,
    out: Array | None = ...,
) -> SkipRMSNormResult: ...
def rms_norm(
    x: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    skip: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> RMSNormResult | SkipRMSNormResult:
    """Divide each row along the last axis by its root mean square.

    ``y = gamma * x / sqrt(mean(x**2) + eps)``: Zhang & Sennrich (2019), equation 4.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16, shape (..., C)
        Of rank 2 and more. Squares of float64 are to be in range: |x| below 1e150.
    gamma : ndarray of float32, float64, float16 or bfloat16, shape (C,), optional
        The scale of each column; 1 without.
    eps : float
        Added to the mean square, zero or more.
    skip : ndarray, optional
        Added to x before: y is that of ``x + skip``, which is returned too. Of x's shape and dtype.
    where : ndarray of bool, optional
        The rows that count, of shape (..., 1) or what broadcasts to it; y of others is 0, and so is
        their mean square.
    out : ndarray, optional
        Where y goes: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    y : ndarray
        Of x's shape and dtype, in native byte order; fresh, it is contiguous.
    mean_square : ndarray of float64, of x's shape without the last axis
        What the backward needs.
    sum : ndarray
        With `skip`: x + skip, of all rows.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.rms_norm(np.float32([[3, 4], [30, 40]]), eps=0.0).mean_square
    array([  12.5, 1250. ])
    >>> x, attention = np.random.default_rng(0).normal(size=(2, 8, 128, 64)).astype(np.float32)
    >>> y, mean_square, stream = fastbn.rms_norm(x, skip=attention)
    >>> bool(np.array_equal(stream, x + attention)), mean_square.shape
    (True, (8, 128))
    """
    options = eps, skip, where, None, None, out
    y, _, mean_square, total = forward(x, gamma, None, *options, is_centred=False)
    if skip is None:
        return RMSNormResult(y, mean_square)
    return SkipRMSNormResult(y, mean_square, total)


def rms_norm_backward(
    dy: Array,
    x: Array,
    mean_square: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    dsum: Array | None = None,
    where: Array | None = None,
    params: bool = True,
    out: Array | None = None,
) -> RMSGradients:
    """Gradient of `rms_norm`.

    With ``xhat = x / sqrt(mean(x**2) + eps)``: ``dgamma = sum(dy * xhat)`` over all rows, and
    ``dx = (gamma * dy - xhat * mean(gamma * dy * xhat)) / sqrt(mean(x**2) + eps)``, these means
    being of a row: Zhang & Sennrich (2019), differentiated.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, gamma, eps, where
        As given to `rms_norm`; with `skip` x is the sum that it returned, and dx the gradient of
        both.
    mean_square : ndarray of float64
        As `rms_norm` returned it.
    dsum : ndarray, optional
        Gradient that reaches the sum by its other uses; it is added to dx. Of x's shape and dtype.
    params : bool
        Whether dgamma is wanted.
    out : ndarray, optional
        Where dx goes: of x's shape and dtype, any strides; dy or x itself works in place.

    Returns
    -------
    dx : ndarray
        Of x's shape and dtype; of rows that do not count it is 0, or `dsum`.
    dgamma : ndarray, shape (C,), or None
        In gamma's dtype, float32 for half types; without gamma in that of arithmetic on x.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 8, 128, 64))
    >>> y, mean_square = fastbn.rms_norm(x, eps=0.0)
    >>> dx, dgamma = fastbn.rms_norm_backward(dy, x, mean_square, eps=0.0)
    >>> bool(abs((dx * x).sum(-1)).max() < 1e-12)  # to scale x changes nothing
    True
    """
    statistics = {"mean_square": mean_square}
    options = gamma, eps, where, dsum, params, None, None, False, out
    found = backward(dy, x, statistics, *options)
    return RMSGradients(found.dx, found.dgamma)


def forward(
    x: Array,
    gamma: Any,
    beta: Any,
    eps: Any,
    skip: Any,
    where: Any,
    activation: Any,
    residual: Any,
    out: Any,
    *,
    is_centred: bool,
) -> tuple[Array, Array, Array, Array]:
    """y, mean, var and x + skip; what is not centred has mean 0, and the mean square as var."""
    backend, threads = on = current()
    fused = skip, where, activation, residual, out
    plain = backend.plain_rows(x, gamma, beta, eps, is_centred, *fused, threads)
    if plain is not None:
        y, mean, var, total = plain
        return y, mean.reshape(x.shape[:-1]), var.reshape(x.shape[:-1]), total
    batch = Batch(x, "NHWC", where)
    if skip is not None:
        batch = batch.of(_added(batch.array, skip))
    call = Call(on, batch, groups=LAST_AXIS, gamma=gamma, beta=beta)
    found = _run.batch_norm(call, eps, activation, residual, out, is_centred=is_centred)
    return *found, batch.array


@quiet
def _added(x: Array, skip: Any) -> Array:
    """x + skip, in native byte order and rounded once."""
    skip = checks.arrays.companion("skip", skip, "x", x)
    total: Array = np.add(x, skip, dtype=x.dtype.newbyteorder("="))
    return total


def backward(
    dy: Any, x: Any, statistics: dict[str, Any], *options: Any
) -> Gradients | ResidualGradients:
    """The gradients by these statistics: mean and var or, of what is not centred, mean_square."""
    backend, threads = on = current()
    mean, var = statistics.get("mean"), statistics.get("var", statistics.get("mean_square"))
    plain = backend.plain_rows_backward(dy, x, mean, var, *options, threads)
    if plain is not None:
        return named(*plain)
    gamma, eps, where, dsum, params, activation, y, dresidual, out = options
    params = checks.options.flag("params", params)
    batch = Batch(x, "NHWC", where)
    call = Call(on, batch, groups=LAST_AXIS, is_fixed=False, gamma=gamma, **statistics)
    given = _run.BackwardOptions(eps, params, activation, y, dresidual, out, dsum)
    return _run.gradients(call, dy, given)
