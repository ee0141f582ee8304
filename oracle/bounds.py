"""Bounds: how far from exact a result may be, by the promises of docs/numerics.md.

`units` gives an error in units of its bound, so that up to 1 is as promised.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from oracle.arrays import Array, Wide, limits
from oracle.formulas import (
    DoubleBackwardProblem,
    SecondDerivatives,
    WideGradients,
    WideRMSGradients,
    WideSampleGradients,
    double_backward,
    over_channels,
    row_means,
    rstd_of,
)

# --- rounding -------------------------------------------------------------------------------------


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


# --- batch norm -----------------------------------------------------------------------------------


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


STEEPEST = {"hard_sigmoid": 1 / 6, "hard_swish": 1.5, "silu": 1.1}
"""The largest slopes."""


def bound_curve(dtype: Any, bound: Wide, y: Wide, kind: str) -> Wide:
    """How far y may be off, a curve of what was within a bound."""
    steepest, roundings = np.longdouble(STEEPEST[kind]), np.longdouble(4 * unit(dtype))
    around: Wide = steepest * bound + roundings * np.abs(y) + 2048 * smallest(dtype)
    return around


def bound_gated(dtype: Any, dy: Wide, bound: Wide) -> Wide:
    """How far a gated dy may be off, or what was made of it within a bound times |dy|."""
    return bound + unit(dtype) * np.abs(dy)


def subnormal_terms(dtype: Any, xhat: Wide) -> Wide:
    """How far dx may be off because terms below the normal numbers are rounded there, each by half
    of the smallest: two of kernels, two of their constant and, times xhat, the coefficient of xhat.
    `units` has one whole."""
    off: Wide = smallest(dtype) * (1 + np.abs(xhat) / 2)
    return off


def bound_added(dtype: Any, total: Wide, bound: Wide) -> Wide:
    """How far dx + dsum may be off, where dx was within a bound: a sum is rounded."""
    added: Wide = bound + unit(dtype) / 2 * (np.abs(total) + bound)
    return added


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
    """How far each dx may be off; with frozen statistics it is dy scaled, and so is the bound."""
    rstd = rstd_of(var, eps)
    k = factor(dtype, mean, rstd)
    each: Wide = (2 * k * np.abs(gamma) * rstd)[:, None]
    if frozen:
        return each * np.abs(dy)
    xhat = np.abs(exact.xhat)
    size = np.abs(dy) + exact.mean_dy[:, None] + xhat * exact.mean_dy_xhat[:, None]
    bound: Wide = each * size + subnormal_terms(dtype, xhat)
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


# --- group, instance and layer norm ---------------------------------------------------------------


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
    return bound + subnormal_terms(dtype, exact.xhat)


def bound_sample_sums(
    dtype: Any, exact: WideSampleGradients, mean: Wide, var: Wide, eps: float
) -> tuple[Wide, Wide]:
    """How far dgamma and dbeta, stored as `dtype`, may be off: what samples' sums are, together."""
    relative = np.longdouble(1e-12) + 4 * 2.0**-52 * np.abs(mean) * rstd_of(var, eps)
    of_sums = (over_channels(relative, exact.sums.shape[1])[:, :, 0] * exact.sums).sum(0)
    u = np.longdouble(unit(dtype))
    return u * np.abs(exact.dgamma) + of_sums, u * np.abs(exact.dbeta) + of_sums


# --- RMS norm -------------------------------------------------------------------------------------


def bound_mean_square(mean_square: Wide) -> Wide:
    """How far a mean square may be off."""
    return bound_var(mean_square)


def bound_rms_y(dtype: Any, of_gamma: Any, y: Wide) -> Wide:
    """How far each y may be off: nothing is subtracted, so the error is relative."""
    if np.dtype(dtype).itemsize == 8:
        return np.longdouble(1e-12) * np.abs(y)
    return np.longdouble(unit(dtype) * (3 if np.dtype(of_gamma).itemsize <= 4 else 3.5)) * np.abs(y)


def bound_rms_dx(dtype: Any, exact: WideRMSGradients) -> Wide:
    """How far each dx may be off."""
    k = 2e-12 if np.dtype(dtype).itemsize == 8 else 4 * unit(dtype)
    return np.longdouble(k) * exact.terms + subnormal_terms(dtype, exact.xhat)


def bound_rms_dgamma(dtype: Any, exact: WideRMSGradients) -> Wide:
    """How far dgamma, stored as `dtype`, may be off."""
    u = np.longdouble(unit(dtype))
    return u * np.abs(exact.dgamma) + np.longdouble(1e-12) * exact.sums


# --- double backward ------------------------------------------------------------------------------


def double_backward_terms(p: DoubleBackwardProblem) -> SecondDerivatives:
    """How large the terms are that second derivatives are made of, and their parts."""
    v, a, b, g = (np.abs(column) for column in p.columns())
    dy, s, xhat, n = np.abs(p.dy), p.rstd, np.abs(p.xhat), p.x.shape[1]
    if p.frozen:
        return SecondDerivatives(g * s * v + a * (1 + xhat) + b, a * s * dy, (s * v * dy).sum(1))
    of_v, of_dy = (f + row_means(f) + xhat * row_means(f * xhat) for f in (v, dy))
    sum_v, sum_dy = (row_means(f) + row_means(f * xhat) for f in (v, dy))
    product = row_means(v * dy) + 2 * sum_v * sum_dy
    dx = a * s * of_dy + g * s**2 * (xhat * product + sum_dy * of_v + sum_v * of_dy)
    return SecondDerivatives(g * s * of_v + a * (1 + xhat) + b, dx, (n * s * product)[:, 0])


def bound_double_backward(dtype: Any, of_gamma: Any, p: DoubleBackwardProblem) -> SecondDerivatives:
    """How far second derivatives may be off, stored as `dtype` and dgamma as `of_gamma`.

    Each of the two passes of dx rounds terms below the normal numbers as that of `bound_dx` does;
    `units` has one of these roundings.
    """
    exact, terms = double_backward(p), double_backward_terms(p)
    ratio = np.abs(p.mean) * p.rstd[:, 0]
    k = 2 * factor(dtype, p.mean, p.rstd[:, 0])[:, None]
    of_sum = np.longdouble(1e-12) + (0 if p.frozen else 4 * 2.0**-52) * ratio
    of_dx = k * terms.dx
    if not p.frozen:
        of_dx = of_dx + smallest(dtype) * (3 + np.abs(p.xhat))
    ddy, dx = _stored_derivatives(dtype, p, exact, k * terms.ddy, of_dx)
    return SecondDerivatives(ddy, dx, unit(of_gamma) * np.abs(exact.dgamma) + of_sum * terms.dgamma)


def _stored_derivatives(
    dtype: Any, p: DoubleBackwardProblem, exact: SecondDerivatives, ddy: Wide, dx: Wide
) -> tuple[Wide, Wide]:
    """The bounds of ddy and dx, which are stored before ddbeta or a third array is added, too."""
    if p.ddx is not None and p.ddbeta is not None:
        before = exact.ddy - p.ddbeta[:, None]
        ddy = stored(dtype, before, ddy)
    if p.ddx is not None and not p.frozen:
        _, a, _, g = p.columns()
        share = p.rstd * (a - g * p.rstd * row_means(p.ddx * p.xhat))
        dx = stored(dtype, exact.dx - share * (p.dy - row_means(p.dy)), dx)
    return stored(dtype, exact.ddy, ddy), stored(dtype, exact.dx, dx)


# --- units ----------------------------------------------------------------------------------------


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
