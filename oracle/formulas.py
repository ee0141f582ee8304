"""Exact results: the formulas in extended precision, of arrays as `oracle.arrays` sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from oracle.arrays import Array, Wide, channel_axis

ACTIVATIONS: tuple[Any, ...] = (None, "relu", "relu6", ("leaky_relu", 0.1))
CURVES = ("hard_sigmoid", "hard_swish", "silu")
"""Activations of inference."""


# --- batch norm -----------------------------------------------------------------------------------


def rstd_of(var: Wide, eps: float) -> Wide:
    """1 / sqrt(var + eps), and 0 where var + eps is 0."""
    total = var + np.longdouble(eps)
    return np.where(total == 0, 0, 1 / np.sqrt(np.where(total == 0, 1, total)))


def moments(x: Wide) -> tuple[Wide, Wide]:
    """Mean and biased variance of each row: two passes about the row's first value."""
    shift = x[:, :1]
    centred = x - shift
    offset = centred.mean(1, keepdims=True)
    centred -= offset
    residue = centred.mean(1, keepdims=True)
    var = np.square(centred).mean(1) - np.square(residue[:, 0])
    return (shift + (offset + residue))[:, 0], np.maximum(var, 0)


def normalize(x: Wide, mean: Wide, var: Wide, gamma: Wide, beta: Wide, eps: float) -> Wide:
    """y of each row, by given statistics."""
    scale = gamma * rstd_of(var, eps)
    return (x - mean[:, None]) * scale[:, None] + beta[:, None]


class WideGradients(NamedTuple):
    """The gradients in extended precision, and the means of magnitudes their bounds speak of."""

    dx: Wide
    dgamma: Wide
    dbeta: Wide
    xhat: Wide
    mean_dy: Wide
    """mean |dy| of each row."""
    mean_dy_xhat: Wide
    """mean |dy xhat| of each row."""


def backward(
    dy: Wide, x: Wide, mean: Wide, var: Wide, gamma: Wide, eps: float, *, frozen: bool
) -> WideGradients:
    """The gradients of `batch_norm`, or (`frozen`) of `normalize`."""
    rstd = rstd_of(var, eps)[:, None]
    xhat = (x - mean[:, None]) * rstd
    dx = dy.copy()
    if not frozen:
        dx -= dy.mean(1, keepdims=True) + xhat * (dy * xhat).mean(1, keepdims=True)
    return WideGradients(
        dx * gamma[:, None] * rstd,
        (dy * xhat).sum(1),
        dy.sum(1),
        xhat,
        np.abs(dy).mean(1),
        np.abs(dy * xhat).mean(1),
    )


def textbook(x: Array, gamma: Array, beta: Array, eps: float, layout: str) -> Array:
    """Batch normalization as it is printed, for complex arrays too: no `abs` in the variance."""
    axis = channel_axis(x.ndim, layout)
    over = tuple(a for a in range(x.ndim) if a != axis)
    mean = x.mean(over, keepdims=True)
    var = ((x - mean) ** 2).mean(over, keepdims=True)
    return textbook_frozen(x, mean, var, gamma, beta, eps, layout)


def textbook_frozen(
    x: Array, mean: Array, var: Array, gamma: Array, beta: Array, eps: float, layout: str
) -> Array:
    """The inference transform as it is printed."""
    shape = [1] * x.ndim
    shape[channel_axis(x.ndim, layout)] = -1
    mean, var, gamma, beta = (v.reshape(shape) for v in (mean, var, gamma, beta))
    y: Array = gamma * (x - mean) / np.sqrt(var + eps) + beta
    return y


def textbook_backward(
    dy: Array, x: Array, gamma: Array, eps: float, layout: str, fixed: tuple[Array, Array] | None
) -> tuple[Array, Array, Array]:
    """dx, dgamma and dbeta as they are printed, for complex arrays too; the mean and variance are
    x's own, or fixed."""
    channel = channel_axis(x.ndim, layout)
    over = tuple(axis for axis in range(x.ndim) if axis != channel)
    shape = [-1 if axis == channel else 1 for axis in range(x.ndim)]

    def mean(a: Array) -> Array:
        return np.asarray(a.mean(over, keepdims=True))

    m, v = (
        (mean(x), mean((x - mean(x)) ** 2)) if fixed is None else (a.reshape(shape) for a in fixed)
    )
    xhat = (x - m) / np.sqrt(v + eps)
    through = 0 if fixed is not None else mean(dy) + xhat * mean(dy * xhat)
    dx = gamma.reshape(shape) / np.sqrt(v + eps) * (dy - through)
    return dx, (dy * xhat).sum(over), dy.sum(over)


def _bends(activation: Any) -> tuple[float, float]:
    """The slope below 0 and the largest value of an activation."""
    if isinstance(activation, tuple):
        return activation[1], np.inf
    return {None: (1.0, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}[activation]


def fused(bn: Wide, activation: Any, residual: Wide | None) -> Wide:
    """activation(bn + residual)."""
    v = bn if residual is None else bn + residual
    slope, top = _bends(activation)
    negative = v * np.longdouble(slope) if slope else np.zeros_like(v)
    return np.where(v <= 0, negative, np.minimum(v, top))


def curve(v: Wide, kind: str) -> Wide:
    """An activation of inference."""
    one = np.longdouble(1)
    share: Wide = one / (one + np.exp(-v))
    if kind != "silu":
        share = np.minimum(np.maximum(v + 3 * one, 0 * one), 6 * one) / (6 * one)
    return share if kind == "hard_sigmoid" else v * share


def gated(dy: Wide, y: Wide, activation: Any) -> Wide:
    """dy times the derivative of the activation where it gave y; at a kink the negative side's."""
    slope, top = _bends(activation)
    passed = np.where(y <= 0, dy * np.longdouble(slope) if slope else 0, dy)
    return passed if top == np.inf else np.where(y >= top, 0, passed)


# --- double backward ------------------------------------------------------------------------------


class DoubleBackwardProblem(NamedTuple):
    """What second derivatives are of, in extended precision; None where nothing was given."""

    ddx: Wide | None
    ddgamma: Wide | None
    ddbeta: Wide | None
    dy: Wide
    x: Wide
    mean: Wide
    var: Wide
    gamma: Wide
    eps: float
    frozen: bool

    @property
    def rstd(self) -> Wide:
        """1 / sqrt(var + eps) of each row."""
        return rstd_of(self.var, self.eps)[:, None]

    @property
    def xhat(self) -> Wide:
        """The normalized x."""
        return (self.x - self.mean[:, None]) * self.rstd

    def columns(self) -> tuple[Wide, Wide, Wide, Wide]:
        """ddx, and ddgamma, ddbeta and gamma as columns, with zeros for what was not given."""
        zero = np.zeros_like(self.mean)
        vectors = (zero if a is None else a for a in (self.ddgamma, self.ddbeta))
        a, b, g = (v[:, None] for v in (*vectors, self.gamma))
        return np.zeros_like(self.x) if self.ddx is None else self.ddx, a, b, g


class SecondDerivatives(NamedTuple):
    """Second derivatives, or how far each may be off."""

    ddy: Wide
    dx: Wide
    dgamma: Wide


def row_means(a: Wide) -> Wide:
    """The mean of each row, as a column."""
    return np.asarray(a.mean(1, keepdims=True))


def double_backward(p: DoubleBackwardProblem) -> SecondDerivatives:
    """The gradients of sum(ddx * dx) + sum(ddgamma * dgamma) + sum(ddbeta * dbeta)."""
    v, a, b, g = p.columns()
    s, xhat = p.rstd, p.xhat
    if p.frozen:
        return SecondDerivatives(g * s * v + a * xhat + b, a * s * p.dy, (s * v * p.dy).sum(1))

    def centred(f: Wide) -> Wide:
        return f - row_means(f) - xhat * row_means(f * xhat)

    of_v, of_dy = centred(v), centred(p.dy)
    product = row_means(v * of_dy)
    dx = xhat * product + row_means(p.dy * xhat) * of_v + row_means(v * xhat) * of_dy
    dgamma = (s * v * of_dy).sum(1)
    return SecondDerivatives(g * s * of_v + a * xhat + b, a * s * of_dy - g * s**2 * dx, dgamma)


# --- group, instance and layer norm ---------------------------------------------------------------
# Arrays as (N, C, P), statistics as (N, groups): each sample's group is a batch of one channel,
# whose gamma and beta differ from place to place.


def over_channels(statistic: Wide, channels: int) -> Wide:
    """A statistic of groups for each of their channels: (N, C, 1)."""
    return np.repeat(statistic, channels // statistic.shape[1], 1)[:, :, None]


def _over_groups(a: Wide, groups: int) -> Wide:
    """The values of each group as a row."""
    return a.reshape(len(a) * groups, -1)


def _group_means(a: Wide, groups: int) -> Wide:
    means: Wide = _over_groups(a, groups).mean(1).reshape(len(a), groups)
    return means


def sample_moments(x: Wide, groups: int) -> tuple[Wide, Wide]:
    """Mean and biased variance of each sample's groups."""
    mean, var = moments(_over_groups(x, groups))
    return mean.reshape(len(x), groups), var.reshape(len(x), groups)


def sample_normalize(x: Wide, mean: Wide, var: Wide, gamma: Wide, beta: Wide, eps: float) -> Wide:
    """y by given statistics of groups."""
    m, rstd = (over_channels(v, x.shape[1]) for v in (mean, rstd_of(var, eps)))
    return (x - m) * rstd * gamma[:, None] + beta[:, None]


class WideSampleGradients(NamedTuple):
    """The gradients in extended precision, and the magnitudes that their bounds speak of."""

    dx: Wide
    dgamma: Wide
    dbeta: Wide
    xhat: Wide
    terms: Wide
    """|gamma dy| + mean|gamma dy| + |xhat| mean|gamma dy xhat|, over s, of each place."""
    sums: Wide
    """sum|dy| + sum|dy xhat| of each sample's channels, (N, C)."""


def sample_backward(
    dy: Wide, x: Wide, mean: Wide, var: Wide, gamma: Wide, eps: float
) -> WideSampleGradients:
    """The gradients through the statistics of groups."""
    channels, groups = x.shape[1], mean.shape[1]
    m, rstd = (over_channels(v, channels) for v in (mean, rstd_of(var, eps)))
    xhat, scaled = (x - m) * rstd, dy * gamma[:, None]

    def of_group(a: Wide) -> Wide:
        return over_channels(_group_means(a, groups), channels)

    dx = scaled - of_group(scaled) - xhat * of_group(scaled * xhat)
    size = np.abs(scaled)
    terms = size + of_group(size) + np.abs(xhat) * of_group(np.abs(scaled * xhat))
    sums = np.abs(dy).sum(2) + np.abs(dy * xhat).sum(2)
    dgamma, dbeta = (dy * xhat).sum((0, 2)), dy.sum((0, 2))
    return WideSampleGradients(dx * rstd, dgamma, dbeta, xhat, terms * rstd, sums)


# --- RMS norm -------------------------------------------------------------------------------------
# Arrays as (R, C): rows with statistics of their own, gamma by column.


class WideRMSGradients(NamedTuple):
    """The gradients in extended precision, and the magnitudes that their bounds speak of."""

    dx: Wide
    dgamma: Wide
    xhat: Wide
    terms: Wide
    """(|gamma dy| + |xhat| mean|gamma dy xhat|) over the root mean square, of each value."""
    sums: Wide
    """sum|dy xhat| of each column."""


def rms_normalize(x: Wide, mean_square: Wide, gamma: Wide, eps: float) -> Wide:
    """y by given mean squares."""
    return x * rstd_of(mean_square, eps)[:, None] * gamma


def rms_backward(dy: Wide, x: Wide, mean_square: Wide, gamma: Wide, eps: float) -> WideRMSGradients:
    """The gradients through the mean squares."""
    inverse = rstd_of(mean_square, eps)[:, None]
    xhat, scaled = x * inverse, dy * gamma
    dx = scaled - xhat * (scaled * xhat).mean(1, keepdims=True)
    terms = np.abs(scaled) + np.abs(xhat) * np.abs(scaled * xhat).mean(1, keepdims=True)
    products = dy * xhat
    sums = np.abs(products).sum(0)
    return WideRMSGradients(dx * inverse, products.sum(0), xhat, terms * inverse, sums)
