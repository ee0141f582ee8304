"""Group, instance and layer norm: batch norm by statistics of each sample.

1. Group norm normalizes each sample by the statistics of groups of consecutive channels; instance
   norm by those of each channel, layer norm by those of all. They are the passes of batch norm on
   virtual batches of one sample, whose channels are pooled in groups. gamma and beta are of
   channels, always.
2. Where a sample has one place, as in (N, C), its groups are rows of memory, and a backend's
   functions on rows do the work: statistics of a row, gamma and beta by column.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from numpy.typing import NDArray

from fastbn import _run, checks, row_norms
from fastbn._batch import Batch
from fastbn._call import Call
from fastbn.config import current
from fastbn.functional import ActivationName
from fastbn.layouts import ALL_CHANNELS, EACH_CHANNEL
from fastbn.results import BatchNormResult, Gradients, ResidualGradients, SkipResult, named

Array = NDArray[Any]


def group_norm(
    x: Array,
    groups: int,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """Normalize each sample by the statistics of its groups of channels.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance of a
    sample's C / groups consecutive channels, over all places: Wu & He (2018), section 3. Training
    and inference are the same.

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, out
        As in `fastbn.batch_norm`; gamma and beta are of channels, (C,).
    groups : int
        A divisor of C.
    where : ndarray of bool, optional
        Which places count, the same for all channels, as in `fastbn.batch_norm`. y is 0 elsewhere;
        a sample of which nothing counts has statistics of 0.

    Returns
    -------
    y : ndarray
        x's shape and dtype, in native byte order and, where fresh, x's memory order.
    mean, var : ndarray of float64, shape (N, groups)
        The statistics used; var is biased. Zeros where there are no values.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (4, 6, 8, 8)).astype(np.float32)
    >>> y, mean, var = fastbn.group_norm(x, 2)
    >>> mean.shape, bool(abs(y[1, 3:].mean()) < 1e-6), round(float(y[1, 3:].std()), 4)
    ((4, 2), True, 1.0)
    """
    fused = eps, layout, activation, residual, where, out
    return _forward(x, checks.options.groups(groups), gamma, beta, *fused)


def instance_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """Normalize each channel of each sample by its own statistics.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance over the
    places of one channel of one sample: Ulyanov et al. (2016); group norm with C groups.

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, out
        As in `fastbn.batch_norm`.
    where : ndarray of bool, optional
        As in `group_norm`.

    Returns
    -------
    y : ndarray
        As `group_norm` returns it.
    mean, var : ndarray of float64, shape (N, C)
        The statistics used; var is biased.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.instance_norm(np.float32([[[1, 3], [10, 30]]]), eps=0.0).y
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    """
    fused = eps, layout, activation, residual, where, out
    return _forward(x, EACH_CHANNEL, gamma, beta, *fused)


@overload
def layer_norm(
    x: Array,
    gamma: Array | None = ...,
    beta: Array | None = ...,
    *,
    eps: float = ...,
    layout: str = ...,
    axes: Literal["sample", "last"] = ...,
    activation: ActivationName = ...,
    residual: Array | None = ...,
    skip: None = ...,
    where: Array | None = ...,
    out: Array | None = ...,
) -> BatchNormResult: ...
@overload
def layer_norm(
    x: Array,
    gamma: Array | None = ...,
    beta: Array | None = ...,
    *,
    eps: float = ...,
    layout: str = ...,
    axes: Literal["last"],
    activation: ActivationName = ...,
    residual: Array | None = ...,
    skip: Array,
    where: Array | None = ...,
    out: Array | None = ...,
) -> SkipResult: ...
def layer_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    axes: Literal["sample", "last"] = "sample",
    activation: ActivationName = None,
    residual: Array | None = None,
    skip: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> BatchNormResult | SkipResult:
    """Normalize each sample, or each row along the last axis, by its own statistics.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance over all
    axes but the first, or over the last axis alone: Ba et al. (2016).

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, out
        As in `fastbn.batch_norm`; gamma and beta are of channels, (C,), not of elements.
    axes : {"sample", "last"}
        What is normalized together: a sample, which is group norm with one group; or each row along
        the last axis by itself, as of the tokens of a transformer, (N, L, C). The channels are that
        axis then, whatever `layout` says.
    skip : ndarray, optional
        With ``axes="last"``, added to x before: y is that of ``x + skip``, which is returned too.
        Of x's shape and dtype. (A `residual` is added to y.)
    where : ndarray of bool, optional
        As in `group_norm`; with ``axes="last"`` the rows that count, of shape (..., 1) or what
        broadcasts to it. y of others is 0, and so are their statistics.

    Returns
    -------
    y : ndarray
        As `group_norm` returns it; fresh and of ``axes="last"``, it is contiguous.
    mean, var : ndarray of float64, shape (N,), or x's without the last axis
        The statistics used; var is biased.
    sum : ndarray
        With `skip`: x + skip, of all rows.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.layer_norm(np.float32([[1, 3], [10, 30]]), eps=0.0)
    BatchNormResult(y=array([[-1.,  1.],
           [-1.,  1.]], dtype=float32), mean=array([ 2., 20.]), var=array([  1., 100.]))
    >>> tokens, attention = np.random.default_rng(0).normal(size=(2, 8, 128, 64))
    >>> y, mean, var, stream = fastbn.layer_norm(tokens, axes="last", skip=attention)
    >>> mean.shape, bool(abs(y.mean(-1)).max() < 1e-12)
    ((8, 128), True)
    """
    if checks.options.axes(axes, skip=skip) == "sample":
        fused = eps, layout, activation, residual, where, out
        return _forward(x, ALL_CHANNELS, gamma, beta, *fused)
    checks.options.layout(layout)
    options = eps, skip, where, activation, residual, out
    y, mean, var, total = row_norms.forward(x, gamma, beta, *options, is_centred=True)
    return BatchNormResult(y, mean, var) if skip is None else SkipResult(y, mean, var, total)


def group_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    groups: int,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    where: Array | None = None,
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `group_norm`, through the samples' own statistics.

    With ``xhat = (x - mean) / sqrt(var + eps)``, ``dbeta = sum(dy)`` and
    ``dgamma = sum(dy * xhat)`` over samples and places, and
    ``dx = (gamma * dy - mean(gamma * dy) - xhat * mean(gamma * dy * xhat)) / sqrt(var + eps)``,
    these means being of a group: Wu & He (2018), differentiated. With an activation, dy is
    first multiplied by its slope.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, groups, gamma, eps, layout, where
        As given to `group_norm`.
    mean, var : ndarray of float64, shape (N, groups)
        As `group_norm` returned them. No variance may be negative.
    params, activation, y, dresidual, out
        As in `fastbn.batch_norm_backward`.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As `fastbn.batch_norm_backward` returns them; dgamma and dbeta are sums over all samples.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> rng = np.random.default_rng(0)
    >>> x, dy = rng.normal(size=(2, 16, 6, 5, 5))
    >>> y, mean, var = fastbn.group_norm(x, 3)
    >>> dx, dgamma, dbeta = fastbn.group_norm_backward(dy, x, mean, var, 3)
    >>> bool(np.allclose(dbeta, dy.sum((0, 2, 3)))), bool(abs(dx[0, :2].sum()) < 1e-12)
    (True, True)
    """
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, where, out
    return _backward(checks.options.groups(groups), *arguments)


def instance_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    where: Array | None = None,
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `instance_norm`, through the samples' own statistics.

    ``dx = gamma * (dy - mean(dy) - xhat * mean(dy * xhat)) / sqrt(var + eps)``, these means being
    of a sample's channel, and dgamma and dbeta as of `group_norm_backward`: Ulyanov et al. (2016),
    differentiated.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, gamma, eps, layout, where
        As given to `instance_norm`.
    mean, var : ndarray of float64, shape (N, C)
        As `instance_norm` returned them. No variance may be negative.
    params, activation, y, dresidual, out
        As in `fastbn.batch_norm_backward`.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As `fastbn.batch_norm_backward` returns them; dgamma and dbeta are sums over all samples.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 16, 3, 5, 5))
    >>> y, mean, var = fastbn.instance_norm(x)
    >>> bool(abs(fastbn.instance_norm_backward(dy, x, mean, var).dx[0, 0].sum()) < 1e-12)
    True
    """
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, where, out
    return _backward(EACH_CHANNEL, *arguments)


def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    axes: Literal["sample", "last"] = "sample",
    params: bool = True,
    activation: ActivationName = None,
    y: Array | None = None,
    dresidual: bool | Array = False,
    dsum: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `layer_norm`, through the statistics.

    ``dx = (gamma * dy - mean(gamma * dy) - xhat * mean(gamma * dy * xhat)) / sqrt(var + eps)``,
    these means being of what is normalized together, and dgamma and dbeta as of
    `group_norm_backward`: Ba et al. (2016), differentiated.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, gamma, eps, layout, axes, where
        As given to `layer_norm`; with `skip` x is the sum that it returned, and dx the gradient of
        both.
    mean, var : ndarray of float64
        As `layer_norm` returned them. No variance may be negative.
    dsum : ndarray, optional
        With ``axes="last"``, gradient that reaches the sum by its other uses; it is added to dx. Of
        x's shape and dtype.
    params, activation, y, dresidual, out
        As in `fastbn.batch_norm_backward`.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As `fastbn.batch_norm_backward` returns them; dgamma and dbeta are sums over all samples.

    Raises
    ------
    TypeError, ValueError
        An argument has a wrong type, shape or value; nothing has been written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.random.default_rng(0).normal(size=(2, 16, 30))
    >>> y, mean, var = fastbn.layer_norm(x)
    >>> bool(abs(fastbn.layer_norm_backward(dy, x, mean, var).dx[0].sum()) < 1e-12)
    True
    """
    fused = params, activation, y, dresidual
    if checks.options.axes(axes, dsum=dsum) == "sample":
        return _backward(ALL_CHANNELS, dy, x, mean, var, gamma, eps, layout, *fused, where, out)
    checks.options.layout(layout)
    statistics = {"mean": mean, "var": var}
    return row_norms.backward(dy, x, statistics, gamma, eps, where, dsum, *fused, out)


def _forward(x: Array, groups: int, gamma: Any, beta: Any, *options: Any) -> BatchNormResult:
    """All forward functions; the groups of channels are what tells them apart."""
    backend, threads = on = current()
    eps, layout, activation, residual, where, out = options
    if where is None:
        fused = eps, layout, activation, residual, out
        plain = backend.plain_samples(x, groups, 1, gamma, beta, *fused, threads)
        if plain is not None:
            return BatchNormResult(*plain)
    call = Call(on, Batch(x, layout, where), groups=groups, gamma=gamma, beta=beta)
    return _run.batch_norm(call, eps, activation, residual, out)


def _backward(groups: int, dy: Any, x: Any, *options: Any) -> Gradients | ResidualGradients:
    """All backward functions."""
    backend, threads = on = current()
    *given, where, out = options
    if where is None:
        plain = backend.plain_samples_backward(dy, x, groups, 1, *given, out, threads)
        if plain is not None:
            return named(*plain)
    mean, var, gamma, eps, layout, params, activation, y, dresidual = given
    params = checks.options.flag("params", params)
    vectors = {"gamma": gamma, "mean": mean, "var": var}
    call = Call(on, Batch(x, layout, where), groups=groups, is_fixed=False, **vectors)
    return _run.gradients(
        call, dy, _run.BackwardOptions(eps, params, activation, y, dresidual, out)
    )
