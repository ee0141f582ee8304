"""Second derivatives: the gradients of what the backward functions give.

1. A loss of dx, dgamma and dbeta has the gradients ddx, ddgamma and ddbeta with respect to them.
   With P(a) = a - mean(a) - xhat * mean(a * xhat), by which the backward is
   dx = gamma * rstd * P(dy), its gradients with respect to dy and x are combinations of ddx, dy,
   xhat and 1, whose coefficients, like dgamma, are numbers of a channel.
2. These numbers follow from the gradient moments of three pairs: (dy, x), (ddx, x), and (ddx, dy)
   with dy about its mean, so that what a mean of dy contributes never has to cancel.
3. The combinations are passes that backends have: the gradient of the input has two arrays, and
   normalization of a third, or of a constant, adds the first two as its residual, in place. So
   nothing is held besides the results. Half types round what stands between the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn._batch import Batch
from fastbn._call import Call, Span
from fastbn.activations import LINEAR
from fastbn.backends.base import (
    Affine,
    Backend,
    BackwardTables,
    Epilogue,
    GradientCoefficients,
    Part,
    Table,
    frozen_coefficients,
    gradient_coefficients,
    inverse_deviation,
    normal_scale,
    quiet,
)
from fastbn.backends.tuning import CHANNEL_BYTES
from fastbn.config import current
from fastbn.results import SecondGradients

Array = NDArray[Any]


def batch_norm_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: None = None,
) -> SecondGradients:
    """Gradient of `batch_norm_backward`, through the batch's own statistics.

    Of ``sum(ddx * dx') + sum(ddgamma * dgamma') + sum(ddbeta * dbeta')``, where dx', dgamma' and
    dbeta' are what `batch_norm_backward` gives for dy and x, with respect to dy, x and gamma. With
    ``s = 1 / sqrt(var + eps)``, ``xhat = (x - mean) * s``, n values a channel and
    ``P(a) = a - mean(a) - xhat * mean(a * xhat)``:

    ``ddy = gamma * s * P(ddx) + ddgamma * xhat + ddbeta``,
    ``dgamma = s * sum(ddx * P(dy))`` and
    ``dx = ddgamma * s * P(dy) - gamma * s**2 * (xhat * mean(ddx * P(dy)) +
    mean(dy * xhat) * P(ddx) + mean(ddx * xhat) * P(dy))``: the formulas of Ioffe & Szegedy (2015),
    section 3, differentiated once more.

    Apart from the results nothing of x's size is held, but one dense copy of each array that
    cannot be walked where it lies.

    Parameters
    ----------
    ddx : ndarray or None
        Gradient with respect to dx', of x's shape and dtype. None, here and below, stands for
        zeros; one of the three must be there.
    ddgamma, ddbeta : ndarray of float32, float64, float16 or bfloat16, shape (C,), or None
        Gradients with respect to dgamma' and dbeta'.
    dy, x, mean, var, gamma, eps, layout
        As given to `batch_norm_backward`.
    activation : None
        An activation has no second derivative at its kinks. Away from them: multiply dy by its
        slope where it gave y, and the ddy that comes back as well.

    Returns
    -------
    ddy, dx : ndarray
        x's shape and dtype.
    dgamma : ndarray, shape (C,)
        In gamma's dtype or, where gamma is None, in x's; float32 in place of half types.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been computed.

    Examples
    --------
    The gradient of sum(dx' ** 2), a penalty on dx', along which a small step changes it as much:

    >>> import numpy as np, fastbn
    >>> x, dy, step = np.random.default_rng(0).normal(size=(3, 16, 3, 5, 5))
    >>> def backward(x):
    ...     return fastbn.batch_norm_backward(dy, x, *fastbn.moments(x)).dx
    >>> ddx = 2 * backward(x)
    >>> dx = fastbn.batch_norm_double_backward(ddx, None, None, dy, x, *fastbn.moments(x)).dx
    >>> ahead, behind = ((backward(x + h * step) ** 2).sum() for h in (1e-6, -1e-6))
    >>> bool(np.isclose((ahead - behind) / 2e-6, (dx * step).sum()))
    True
    """
    arguments = ddx, ddgamma, ddbeta, dy, x, mean, var, gamma, eps, layout, activation
    return _double_backward(arguments, frozen=False)


def normalize_double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: None = None,
) -> SecondGradients:
    """Gradient of `normalize_backward`: the statistics are constants.

    As `batch_norm_double_backward`, of what `normalize_backward` gives. With
    ``s = 1 / sqrt(var + eps)`` and ``xhat = (x - mean) * s``:
    ``ddy = gamma * s * ddx + ddgamma * xhat + ddbeta``, ``dx = ddgamma * s * dy`` and
    ``dgamma = s * sum(ddx * dy)``, from Ioffe & Szegedy (2015), Algorithm 2.

    Parameters
    ----------
    ddx, ddgamma, ddbeta, activation
        As in `batch_norm_double_backward`.
    dy, x, mean, var, gamma, eps, layout
        As given to `normalize_backward`.

    Returns
    -------
    ddy, dx, dgamma
        As of `batch_norm_double_backward`.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been computed.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> dy, x, mean, var = np.float64([[1], [2]]), np.float64([[3], [7]]), *np.float64([[5], [4]])
    >>> ddx, ddgamma = np.float64([[1], [1]]), np.float64([6])
    >>> fastbn.normalize_double_backward(ddx, ddgamma, None, dy, x, mean, var, eps=0.0)
    SecondGradients(ddy=array([[-5.5],
           [ 6.5]]), dx=array([[3.],
           [6.]]), dgamma=array([1.5]))
    """
    arguments = ddx, ddgamma, ddbeta, dy, x, mean, var, gamma, eps, layout, activation
    return _double_backward(arguments, frozen=True)


def _double_backward(arguments: tuple[Any, ...], *, frozen: bool) -> SecondGradients:
    """Both functions; `frozen` is what tells them apart."""
    ddx, ddgamma, ddbeta, dy, x, mean, var, gamma, eps, layout, activation = arguments
    vectors = {"mean": mean, "var": var, "gamma": gamma, "ddgamma": ddgamma, "ddbeta": ddbeta}
    call = Call(current(), Batch(x, layout), is_fixed=frozen, **vectors)
    dy = checks.arrays.companion("dy", dy, "x", call.array)
    if ddx is not None:
        ddx = checks.arrays.companion("ddx", ddx, "x", call.array)
    checks.arrays.some_gradient(ddx=ddx, ddgamma=ddgamma, ddbeta=ddbeta)
    eps = checks.options.epsilon(eps)
    checks.options.no_activation(activation)
    ddy, dx, dgamma = call.output("ddy", None, {}), call.output("dx", None, {}), call.new_gradient()
    if call.is_empty:
        ddy.fill(0)
        dx.fill(0)
        return SecondGradients(ddy, dx, dgamma)
    (span,) = call.spans
    views = [None if a is None else span.view(a) for a in (ddx, dy, call.array, ddy, dx)]
    held = CHANNEL_BYTES if ddx is not None else 2 * CHANNEL_BYTES  # a fused walk has tables, too
    for part in span.parts(call.array.nbytes, held):
        work = _work(call, span, part, views, eps)
        _differentiate(work, frozen, dgamma[part.channels])
    return SecondGradients(ddy, dx, dgamma)


class _Work(NamedTuple):
    """Some channels: (G, N, C, S) arrays and (G, C) tables; None where nothing was given."""

    ddx: Array | None
    dy: Array
    x: Array
    ddy: Array
    dx: Array
    mean: Table
    var: Table
    gamma: Table
    ddgamma: Table | None
    ddbeta: Table | None
    eps: float
    backend: Backend
    threads: int


def _work(call: Call, span: Span, part: Part, views: list[Any], eps: float) -> _Work:
    """The work on some channels of a call with these arrays."""
    mean, var, gamma = (call.table(name, 1.0, span, part) for name in ("mean", "var", "gamma"))
    ddgamma, ddbeta = (
        None if call.vectors[name] is None else call.table(name, 0.0, span, part)
        for name in ("ddgamma", "ddbeta")
    )
    ddx, dy, x, ddy, dx = (part.of(view) for view in views)
    return _Work(
        ddx, dy, x, ddy, dx, mean, var, gamma, ddgamma, ddbeta, eps, call.backend, call.threads
    )


@quiet
def _differentiate(w: _Work, frozen: bool, dgamma: Array) -> None:
    """Write the results; dgamma, zeros until now, in gamma's type."""
    if w.ddx is None:
        _without_ddx(w, frozen)
    elif frozen:
        dgamma[...] = _through_constants(w, w.ddx)
    else:
        dgamma[...] = _through_statistics(w, w.ddx)


def _without_ddx(w: _Work, frozen: bool) -> None:
    """Write ddy and dx where dx' has no part in the loss: dx is the backward's, by ddgamma."""
    ddbeta = np.zeros_like(w.mean) if w.ddbeta is None else w.ddbeta
    if w.ddgamma is None:
        w.ddy[...] = ddbeta[:, None, :, None]
        w.dx[...] = 0
        return
    scale = normal_scale(w.ddgamma, w.var, w.eps)
    w.backend.normalize(w.x, Affine(w.mean, scale, ddbeta), w.ddy, w.threads)
    tables = BackwardTables(w.mean, w.var, w.ddgamma, w.eps, frozen)
    w.backend.backward(w.dy, w.x, tables, w.dx, w.threads)


def _through_constants(w: _Work, ddx: Array) -> Table:
    """Write ddy and dx; gives dgamma."""
    rstd = inverse_deviation(w.var, w.eps)
    of_ddy = frozen_coefficients(w.mean, rstd, w.gamma)
    if w.ddgamma is None:
        _write_ddy(w, ddx, None, of_ddy)
        w.dx[...] = 0
    else:
        _write_ddy(w, ddx, w.x, of_ddy._replace(b=w.ddgamma))
        of_dx = frozen_coefficients(w.mean, rstd, w.ddgamma)
        w.backend.input_gradient(w.dy, None, of_dx, w.dx, w.threads)
    _, product = w.backend.gradient_moments(ddx, w.dy, np.zeros_like(rstd), w.threads)
    return np.asarray(rstd * product)


def _through_statistics(w: _Work, ddx: Array) -> Table:
    """The same where mean and variance move with x."""
    rstd, n = inverse_deviation(w.var, w.eps), w.x.shape[1] * w.x.shape[3]
    sum_ddx, ddx_xhat = w.backend.gradient_moments(ddx, w.x, w.mean, w.threads)
    sum_dy, dy_xhat = w.backend.gradient_moments(w.dy, w.x, w.mean, w.threads)
    ddx_xhat, dy_xhat, mean_dy = ddx_xhat * rstd, dy_xhat * rstd, sum_dy / n
    _, product = w.backend.gradient_moments(ddx, w.dy, mean_dy, w.threads)
    dgamma = rstd * (product - ddx_xhat * (dy_xhat / n))
    of_ddy = gradient_coefficients(sum_ddx, ddx_xhat, n, w.mean, rstd, w.gamma)
    if w.ddgamma is not None:
        of_ddy = of_ddy._replace(b=of_ddy.b + w.ddgamma)
    _write_ddy(w, ddx, w.x, of_ddy)
    # dx = p * P(ddx) + q * P(dy) - gamma * rstd * dgamma / n * xhat
    p, q = -of_ddy.a * (rstd * (dy_xhat / n)), of_ddy.b * rstd
    of_xhat = -(p * ddx_xhat + q * dy_xhat + of_ddy.a * dgamma) / n
    w.backend.input_gradient(ddx, w.x, of_ddy._replace(a=p, b=of_xhat), w.dx, w.threads)
    of_dy = Affine(mean_dy, q, np.zeros_like(q))
    w.backend.normalize(w.dy, of_dy, w.dx, w.threads, Epilogue(LINEAR, w.dx))
    return np.asarray(dgamma)


def _write_ddy(
    w: _Work,
    ddx: Array,
    x: Array | None,
    coefficients: GradientCoefficients,
) -> None:
    """What ddx and xhat make of ddy, and ddbeta."""
    w.backend.input_gradient(ddx, x, coefficients, w.ddy, w.threads)
    if w.ddbeta is not None:
        shift = Affine(np.zeros_like(w.ddbeta), np.ones_like(w.ddbeta), w.ddbeta)
        w.backend.normalize(w.ddy, shift, w.ddy, w.threads)
