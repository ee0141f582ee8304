"""What is right, and how far from it a result may be; the tests and the benchmarks ask here.

1. Oracles: the formulas of Ioffe & Szegedy (2015) in `numpy.longdouble`, which has 64 bits of
   significand or more where the library has 53. Every array is seen as rows, (C, n), one row a
   channel.
2. Bounds: the promises of docs/numerics.md as functions. They say how wrong a right library may
   be; no tolerance in the tests was found by trying.
3. Units: an error in units of its bound, so that up to 1 is as promised.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Wide = NDArray[np.longdouble]

DTYPES = (np.float32, np.float64)
HALVES = (np.float16, ml_dtypes.bfloat16)
ACTIVATIONS: tuple[Any, ...] = (None, "relu", "relu6", ("leaky_relu", 0.1))
LAYOUTS = ("NCHW", "NHWC")

assert np.finfo(np.longdouble).eps < 2**-60, "these oracles need an extended long double"


# --- arrays as rows -----------------------------------------------------------------------------


def channel_axis(ndim: int, layout: str) -> int:
    """The axis of the channels."""
    return 1 if layout == "NCHW" else ndim - 1


def channels_of(x: Array, layout: str) -> int:
    """The number of channels."""
    return int(x.shape[channel_axis(x.ndim, layout)])


def rows(a: Array, layout: str) -> Array:
    """The values as (C, n): a row is a channel."""
    axis = channel_axis(a.ndim, layout)
    return np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)


def wide(a: Array, layout: str) -> Wide:
    """The rows in extended precision."""
    return rows(a, layout).astype(np.longdouble)


def to_layout(a: Array, layout: str) -> Array:
    """An NCHW array as a dense array of `layout`."""
    return a if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(a, 1, -1))


def vector(v: Array | None, default: float, channels: int) -> Wide:
    """A parameter, or its default, in extended precision."""
    if v is None:
        return np.full(channels, default, np.longdouble)
    return v.astype(np.longdouble)


def rstd_of(var: Wide, eps: float) -> Wide:
    """1 / sqrt(var + eps), and 0 where var + eps is 0."""
    total = var + np.longdouble(eps)
    return np.where(total == 0, 0, 1 / np.sqrt(np.where(total == 0, 1, total)))


# --- oracles ------------------------------------------------------------------------------------


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


def gated(dy: Wide, y: Wide, activation: Any) -> Wide:
    """dy times the derivative of the activation where it gave y; at a kink the negative side's."""
    slope, top = _bends(activation)
    passed = np.where(y <= 0, dy * np.longdouble(slope) if slope else 0, dy)
    return passed if top == np.inf else np.where(y >= top, 0, passed)


class SecondProblem(NamedTuple):
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


class WideSecond(NamedTuple):
    """Second derivatives, or how far each may be off."""

    ddy: Wide
    dx: Wide
    dgamma: Wide


def _mean(a: Wide) -> Wide:
    """Of each row, as a column."""
    return np.asarray(a.mean(1, keepdims=True))


def second(p: SecondProblem) -> WideSecond:
    """The gradients of sum(ddx * dx) + sum(ddgamma * dgamma) + sum(ddbeta * dbeta)."""
    v, a, b, g = p.columns()
    s, xhat = p.rstd, p.xhat
    if p.frozen:
        return WideSecond(g * s * v + a * xhat + b, a * s * p.dy, (s * v * p.dy).sum(1))

    def centred(f: Wide) -> Wide:
        return f - _mean(f) - xhat * _mean(f * xhat)

    of_v, of_dy = centred(v), centred(p.dy)
    product = _mean(v * of_dy)
    dx = xhat * product + _mean(p.dy * xhat) * of_v + _mean(v * xhat) * of_dy
    dgamma = (s * v * of_dy).sum(1)
    return WideSecond(g * s * of_v + a * xhat + b, a * s * of_dy - g * s**2 * dx, dgamma)


# --- group, instance and layer norm ---------------------------------------------------------------
# Arrays as (N, C, P), statistics as (N, groups): each sample's group is a batch of one channel,
# whose gamma and beta differ from place to place.


def by_sample(a: Array, layout: str) -> Wide:
    """The values as (N, C, P) in extended precision."""
    moved = np.moveaxis(a, channel_axis(a.ndim, layout), 1)
    return moved.reshape(*moved.shape[:2], -1).astype(np.longdouble)


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
    return WideSampleGradients(dx * rstd, dgamma, dbeta, terms * rstd, sums)


# --- bounds -------------------------------------------------------------------------------------


def limits(dtype: Any) -> Any:
    """eps, max and smallest_subnormal of a type, of bfloat16 too."""
    return ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call]


def unit(dtype: Any) -> float:
    """u: 2**-52 for float64, 2**-23 for float32, and for half types, which are computed in it."""
    return 2.0**-52 if np.dtype(dtype).itemsize == 8 else 2.0**-23


def smallest(dtype: Any) -> Any:
    """The least number of the type in which a type is computed."""
    return np.longdouble(float(limits(np.promote_types(dtype, np.float32)).smallest_subnormal))


def stored(dtype: Any, exact: Wide, bound: Wide) -> Wide:
    """The bound of a value that is stored as `dtype`: a half type rounds it once more."""
    if np.dtype(dtype).itemsize > 2:
        return bound
    half_unit = np.longdouble(float(limits(dtype).eps) / 2)
    return bound + half_unit * (np.abs(exact) + bound)


def factor(dtype: Any, mean: Wide, rstd: Wide) -> Wide:
    """k of each channel: 2u for float32 and half types, 1e-12 + 4u|mean|/s for float64."""
    u = unit(dtype)
    if np.dtype(dtype).itemsize <= 4:
        return np.full(mean.shape, 2 * u, np.longdouble)
    k: Wide = np.longdouble(1e-12) + 4 * u * np.abs(mean) * rstd
    return k


def bound_mean(mean: Wide, var: Wide, eps: float) -> Wide:
    """How far a mean may be off."""
    s = np.sqrt(var + np.longdouble(eps))
    bound: Wide = np.longdouble(2.0**-52) * np.abs(mean) + np.longdouble(1e-12) * s
    return bound


def bound_var(var: Wide) -> Wide:
    """How far a variance may be off: nothing where it is 0."""
    bound: Wide = np.longdouble(1e-10) * var
    return bound


def bound_y(
    dtype: Any, y: Wide, mean: Wide, var: Wide, gamma: Wide, beta: Wide, eps: float
) -> Wide:
    """How far each y may be off."""
    k = factor(dtype, mean, rstd_of(var, eps))
    bound: Wide = k[:, None] * (np.abs(y) + np.abs(gamma)[:, None] + np.abs(beta)[:, None])
    return bound


def bound_fused(dtype: Any, bound: Wide, v: Wide, y: Wide) -> Wide:
    """How far y may be off, where bn was within a bound, v = bn + residual and y of that: a sum
    and a product are rounded."""
    fused: Wide = bound + unit(dtype) * (np.abs(v) + np.abs(y))
    return fused


def bound_gated(dtype: Any, dy: Wide, bound: Wide) -> Wide:
    """How far a gated dy may be off, or what was made of it within a bound times |dy|."""
    return bound + unit(dtype) * np.abs(dy)


def bound_dx(
    dtype: Any,
    exact: WideGradients,
    dy: Wide,
    mean: Wide,
    var: Wide,
    gamma: Wide,
    eps: float,
    *,
    frozen: bool,
) -> Wide:
    """How far each dx may be off; with frozen statistics it is dy scaled, and so is the bound.

    Else terms below the normal numbers are rounded there, each by half of the smallest: two of
    kernels, two of their constant and, times xhat, the coefficient of xhat. `units` has one whole.
    """
    rstd = rstd_of(var, eps)
    k = factor(dtype, mean, rstd)
    each: Wide = (2 * k * np.abs(gamma) * rstd)[:, None]
    if frozen:
        return each * np.abs(dy)
    xhat = np.abs(exact.xhat)
    size = np.abs(dy) + exact.mean_dy[:, None] + xhat * exact.mean_dy_xhat[:, None]
    bound: Wide = each * size + smallest(dtype) * (1 + xhat / 2)
    return bound


def _bound_sum(
    dtype: Any, value: Wide, exact: WideGradients, mean: Wide, var: Wide, eps: float
) -> Wide:
    relative = np.longdouble(1e-12) + 4 * 2.0**-52 * np.abs(mean) * rstd_of(var, eps)
    n = exact.dx.shape[1]
    magnitudes = exact.mean_dy + exact.mean_dy_xhat
    bound: Wide = np.longdouble(unit(dtype)) * np.abs(value) + relative * n * magnitudes
    return bound


def bound_dgamma(dtype: Any, exact: WideGradients, mean: Wide, var: Wide, eps: float) -> Wide:
    """How far each dgamma, stored as `dtype`, may be off."""
    return _bound_sum(dtype, exact.dgamma, exact, mean, var, eps)


def bound_dbeta(dtype: Any, exact: WideGradients, mean: Wide, var: Wide, eps: float) -> Wide:
    """How far each dbeta, stored as `dtype`, may be off."""
    return _bound_sum(dtype, exact.dbeta, exact, mean, var, eps)


def bound_sample_var(mean: Wide, var: Wide, channels: int, places: int) -> Wide:
    """How far a group's variance may be off: channels of several places are merged, after their
    means were stored in float64."""
    merged = places > 1 and mean.shape[1] < channels
    off = np.longdouble(2.0**-52 if merged else 0) * np.abs(mean)
    bound: Wide = bound_var(var) + off * np.sqrt(var) + np.square(off) * (var > 0)
    return bound


def bound_sample_y(
    dtype: Any,
    of_gamma: Any,
    y: Wide,
    mean: Wide,
    var: Wide,
    gamma: Wide,
    beta: Wide,
    eps: float,
) -> Wide:
    """How far each y may be off. By column xhat, gamma and their product are rounded in addition;
    gamma is not where it was of float32."""
    k = factor(dtype, mean, rstd_of(var, eps))
    if y.shape[2] == 1 and mean.shape[1] < y.shape[1] and np.dtype(dtype).itemsize <= 4:
        k = k * (1.5 if np.dtype(of_gamma).itemsize <= 4 else 1.75)
    size = np.abs(y) + np.abs(gamma)[:, None] + np.abs(beta)[:, None]
    bound: Wide = over_channels(k, y.shape[1]) * size
    return bound


def bound_sample_dx(
    dtype: Any, exact: WideSampleGradients, mean: Wide, var: Wide, eps: float
) -> Wide:
    """How far each dx may be off."""
    k = factor(dtype, mean, rstd_of(var, eps))
    bound: Wide = 2 * over_channels(k, exact.dx.shape[1]) * exact.terms
    return bound


def bound_sample_sums(
    dtype: Any, exact: WideSampleGradients, mean: Wide, var: Wide, eps: float
) -> tuple[Wide, Wide]:
    """How far dgamma and dbeta, stored as `dtype`, may be off: what samples' sums are, together."""
    relative = np.longdouble(1e-12) + 4 * 2.0**-52 * np.abs(mean) * rstd_of(var, eps)
    of_sums = (over_channels(relative, exact.sums.shape[1])[:, :, 0] * exact.sums).sum(0)
    u = np.longdouble(unit(dtype))
    return u * np.abs(exact.dgamma) + of_sums, u * np.abs(exact.dbeta) + of_sums


def terms_of_second(p: SecondProblem) -> WideSecond:
    """How large the terms are that second derivatives are made of, and their parts."""
    v, a, b, g = (np.abs(column) for column in p.columns())
    dy, s, xhat, n = np.abs(p.dy), p.rstd, np.abs(p.xhat), p.x.shape[1]
    if p.frozen:
        return WideSecond(g * s * v + a * (1 + xhat) + b, a * s * dy, (s * v * dy).sum(1))
    of_v, of_dy = (f + _mean(f) + xhat * _mean(f * xhat) for f in (v, dy))
    sum_v, sum_dy = (_mean(f) + _mean(f * xhat) for f in (v, dy))
    product = _mean(v * dy) + 2 * sum_v * sum_dy
    dx = a * s * of_dy + g * s**2 * (xhat * product + sum_dy * of_v + sum_v * of_dy)
    return WideSecond(g * s * of_v + a * (1 + xhat) + b, dx, (n * s * product)[:, 0])


def bound_second(dtype: Any, of_gamma: Any, p: SecondProblem) -> WideSecond:
    """How far second derivatives may be off, stored as `dtype` and dgamma as `of_gamma`.

    Each of the two passes of dx rounds terms below the normal numbers as that of `bound_dx` does;
    `units` has one of these roundings.
    """
    exact, terms, ratio = second(p), terms_of_second(p), np.abs(p.mean) * p.rstd[:, 0]
    k = 2 * factor(dtype, p.mean, p.rstd[:, 0])[:, None]
    of_sum = np.longdouble(1e-12) + (0 if p.frozen else 4 * 2.0**-52) * ratio
    of_dx = k * terms.dx
    if not p.frozen:
        of_dx = of_dx + smallest(dtype) * (3 + np.abs(p.xhat))
    ddy, dx = _stored_second(dtype, p, exact, k * terms.ddy, of_dx)
    return WideSecond(ddy, dx, unit(of_gamma) * np.abs(exact.dgamma) + of_sum * terms.dgamma)


def _stored_second(
    dtype: Any, p: SecondProblem, exact: WideSecond, ddy: Wide, dx: Wide
) -> tuple[Wide, Wide]:
    """The bounds of ddy and dx, which are stored before ddbeta or a third array is added, too."""
    if p.ddx is not None and p.ddbeta is not None:
        before = exact.ddy - p.ddbeta[:, None]
        ddy = stored(dtype, before, ddy)
    if p.ddx is not None and not p.frozen:
        _, a, _, g = p.columns()
        share = p.rstd * (a - g * p.rstd * _mean(p.ddx * p.xhat))
        dx = stored(dtype, exact.dx - share * (p.dy - _mean(p.dy)), dx)
    return stored(dtype, exact.ddy, ddy), stored(dtype, exact.dx, dx)


# --- units --------------------------------------------------------------------------------------


def overflow(dtype: Any) -> float:
    """From where on a number is rounded to infinity: half way from the largest to what would be
    next."""
    largest = float(limits(dtype).max)
    power = math.ldexp(1, math.frexp(largest)[1]) if np.dtype(dtype).itemsize == 2 else math.inf
    return largest + (power - largest) / 2


def units(actual: Array, expected: Any, bound: Any) -> Wide:
    """Each error |actual - expected| in units of what is allowed, its bound and one smallest
    subnormal of its type; infinite where there should be a number and is none."""
    allowed = bound + np.longdouble(float(limits(actual.dtype).smallest_subnormal))
    with np.errstate(invalid="ignore"):
        off: Wide = np.abs(actual.astype(np.longdouble) - expected) / allowed
    beyond = np.isinf(actual) & (np.sign(actual.astype(float)) == np.sign(expected))
    beyond &= np.abs(expected) + allowed >= overflow(actual.dtype)
    return np.where(beyond, 0, np.where(np.isnan(off), np.inf, off))
