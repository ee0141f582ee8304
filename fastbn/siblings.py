"""The siblings of batch norm: group, instance and layer norm, by statistics of each sample.

1. Group norm normalizes each sample by the statistics of groups of consecutive channels; instance
   norm by those of each channel, layer norm by those of all. They are the passes of batch norm on
   virtual batches of one sample, whose channels are pooled in groups. gamma and beta are of
   channels, always.
2. Where a sample has one place, as in (N, C), its groups are rows of memory, and the trips over
   rows do the work: statistics of a row, gamma and beta by column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import checks
from fastbn.backends.base import Gate, Table, Tail, quiet
from fastbn.call import Call, Sharing, SharingOf, returned
from fastbn.config import current
from fastbn.functional import (
    ActivationName,
    named,
    round_into,
    run_backward,
    run_forward,
)
from fastbn.results import BatchNormResult, Gradients, ResidualGradients

Array = NDArray[Any]

STATISTICS = "mean", "var"


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
    fused = eps, layout, activation, residual, out
    return _forward(x, _by_groups(groups), gamma, beta, *fused)


def instance_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """Normalize each channel of each sample by its own statistics.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance over the
    places of one channel of one sample: Ulyanov et al. (2016); group norm with C groups.

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, out
        As in `fastbn.batch_norm`.

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
    return _forward(x, _by_channel, gamma, beta, eps, layout, activation, residual, out)


def layer_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: ActivationName = None,
    residual: Array | None = None,
    out: Array | None = None,
) -> BatchNormResult:
    """Normalize each sample by its own statistics.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta``, with mean and (biased) variance over all
    axes but the first: Ba et al. (2016); group norm with one group. For sequences normalized token
    by token, reshape (N, L, C) to (N * L, C).

    Parameters
    ----------
    x, gamma, beta, eps, layout, activation, residual, out
        As in `fastbn.batch_norm`; gamma and beta are of channels, (C,), not of elements.

    Returns
    -------
    y : ndarray
        As `group_norm` returns it.
    mean, var : ndarray of float64, shape (N,)
        The statistics used; var is biased.

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
    """
    return _forward(x, _by_sample, gamma, beta, eps, layout, activation, residual, out)


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
    x, groups, gamma, eps, layout
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
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, out
    return _backward(_by_groups(groups), *arguments)


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
    x, gamma, eps, layout
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
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, out
    return _backward(_by_channel, *arguments)


def layer_norm_backward(
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
    out: Array | None = None,
) -> Gradients | ResidualGradients:
    """Gradient of `layer_norm`, through the samples' own statistics.

    ``dx = (gamma * dy - mean(gamma * dy) - xhat * mean(gamma * dy * xhat)) / sqrt(var + eps)``,
    these means being of a sample, and dgamma and dbeta as of `group_norm_backward`: Ba et al.
    (2016), differentiated.

    Parameters
    ----------
    dy : ndarray
        Gradient with respect to y, of x's shape and dtype.
    x, gamma, eps, layout
        As given to `layer_norm`.
    mean, var : ndarray of float64, shape (N,)
        As `layer_norm` returned them. No variance may be negative.
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
    arguments = dy, x, mean, var, gamma, eps, layout, params, activation, y, dresidual, out
    return _backward(_by_sample, *arguments)


def _by_groups(groups: int) -> SharingOf:
    """Consecutive channels, in as many groups."""

    def sharing(samples: int, channels: int) -> Sharing:
        of = checks.channel_groups(groups, channels)
        return Sharing(of, max(channels // of, 1), (samples, of))

    return sharing


def _by_channel(samples: int, channels: int) -> Sharing:
    return Sharing(channels, 1, (samples, channels))


def _by_sample(samples: int, channels: int) -> Sharing:
    return Sharing(1, max(channels, 1), (samples,))


def _forward(
    x: Array,
    sharing: SharingOf,
    gamma: Any,
    beta: Any,
    eps: Any,
    layout: Any,
    activation: Any,
    residual: Any,
    out: Any,
) -> BatchNormResult:
    """All forward functions; what shares statistics is what tells them apart."""
    backend, threads = current()
    fused = activation, residual, out
    plain = backend.plain_samples(x, sharing, gamma, beta, eps, layout, *fused, threads)
    if plain is not None:
        return BatchNormResult(*plain)
    call = Call(x, "x", layout, sharing=sharing, gamma=gamma, beta=beta)
    eps = checks.epsilon(eps)
    tail = call.tail(activation, residual)
    y = call.output("out", out, {"x": call.array, "residual": tail and tail.residual})
    run = _rows_forward if _by_row(call) else run_forward
    mean, var = run(call, eps, tail, y)
    return BatchNormResult(returned(out, y), call.shaped(mean), call.shaped(var))


def _backward(
    sharing: SharingOf,
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    eps: Any,
    layout: Any,
    params: Any,
    activation: Any,
    y: Any,
    dresidual: Any,
    out: Any,
) -> Gradients | ResidualGradients:
    """All backward functions."""
    params = checks.flag("params", params)
    backend, threads = current()
    fused = activation, y, dresidual, out
    arguments = dy, x, sharing, mean, var, gamma, eps, layout, params, *fused, threads
    plain = backend.plain_samples_backward(*arguments)
    if plain is not None:
        return named(*plain)
    vectors = {"gamma": gamma, "mean": mean, "var": var}
    call = Call(x, "x", layout, sharing=sharing, single=False, **vectors)
    dy = checks.companion("dy", dy, "x", call.array)
    eps = checks.epsilon(eps)
    gate, dx = call.backward_outputs(activation, y, dresidual, out, dy, call.array)
    parameters = [call.gradient(), call.gradient()] if params else []
    run = _rows_backward if _by_row(call) else run_backward
    run(call, dy, eps, gate, dx, parameters)
    dgamma, dbeta = parameters or (None, None)
    return named(returned(out, dx), dgamma, dbeta, gate and returned(dresidual, gate.dresidual))


# ---- Rows ----


def _by_row(call: Call) -> bool:
    return any(span.arrangement.by_row for span in call.spans)


@quiet
def _add(totals: list[Table], found: tuple[Table, Table]) -> None:
    """Add the sums of some rows to those of all."""
    for total, sums in zip(totals, found, strict=True):
        total += sums


def _by_column(call: Call, name: str, default: float) -> Table:
    """gamma or beta as a row of float64 for each group."""
    vector, shape = call.vectors[name], (-1, call.pool)
    if vector is None:
        return np.full(call.channels, default).reshape(shape)
    return vector.astype(np.float64).reshape(shape)


def _rows_forward(call: Call, eps: float, tail: Tail | None, y: Array) -> tuple[Table, Table]:
    """Write y; gives the tables of mean and variance."""
    backend, threads = current()
    (span,) = call.spans
    gamma, beta = _by_column(call, "gamma", 1.0), _by_column(call, "beta", 0.0)
    statistics = mean, var = call.statistics(), call.statistics()
    view, target, of_span = span.view(call.array), span.target(y), span.tail(tail)
    for part in span.row_parts(backend, call.array.nbytes, len(gamma)):
        of_part = of_span and of_span.part(part)
        arrays = part.of(view), gamma, beta, eps, part.of(target)
        found = backend.forward_rows(*arrays, threads, of_part)
        for table, rows in zip(statistics, found, strict=True):
            table.reshape(-1)[part.channels] = rows[0]
    span.deliver(target, y)
    return mean, var


def _rows_backward(
    call: Call, dy: Array, eps: float, gate: Gate | None, dx: Array, parameters: list[Array]
) -> None:
    """Write dx, the gate's dresidual and, where they are listed, dgamma and dbeta."""
    backend, threads = current()
    (span,) = call.spans
    gamma = _by_column(call, "gamma", 1.0)
    mean, var = (
        np.require(call.vectors[name], np.float64, ["ALIGNED"]).reshape(1, -1)
        for name in STATISTICS
    )
    totals = [np.full_like(gamma, -0.0), np.full_like(gamma, -0.0)]  # to which -0.0 may be added
    dy_view, x, target = span.view(dy), span.view(call.array), span.target(dx)
    through = span.gate(gate)
    for part in span.row_parts(backend, call.array.nbytes, len(gamma)):
        of_part = through and through.part(part)
        arrays = part.of(dy_view), part.of(x), mean[:, part.channels], var[:, part.channels], gamma
        found = backend.backward_rows(*arrays, eps, part.of(target), threads, of_part)
        _add(totals, found)
    span.deliver(target, dx)
    if gate and through and gate.dresidual is not None and through.dresidual is not None:
        span.deliver(through.dresidual, gate.dresidual)
    round_into(parameters, [total.reshape(-1) for total in totals])
