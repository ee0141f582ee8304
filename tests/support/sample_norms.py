"""Group, instance and layer norm, called alike, against their oracle and its bounds."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from oracle.arrays import Array, Wide, by_sample, channels_of, to_layout, vector
from oracle.bounds import (
    bound_added,
    bound_fused,
    bound_gated,
    bound_mean,
    bound_sample_dx,
    bound_sample_sums,
    bound_sample_var,
    bound_sample_y,
    stored,
)
from oracle.formulas import (
    fused,
    gated,
    over_channels,
    rstd_of,
    sample_backward,
    sample_moments,
    sample_normalize,
)
from support.judge import Judged, assert_within
from support.memoized import memoized

KINDS = ("instance", "layer")


class Norm(NamedTuple):
    """One of the three: "instance", "layer", or so many groups."""

    kind: str | int

    @property
    def forward(self) -> Any:
        """The verb; positional arguments but for groups."""
        if isinstance(self.kind, int):
            return partial(fastbn.group_norm, groups=self.kind)
        return getattr(fastbn, f"{self.kind}_norm")

    @property
    def backward(self) -> Any:
        """The verb; positional arguments but for groups."""
        if isinstance(self.kind, int):
            return partial(fastbn.group_norm_backward, groups=self.kind)
        return getattr(fastbn, f"{self.kind}_norm_backward")

    def groups(self, channels: int) -> int:
        """In each sample."""
        return {"instance": channels, "layer": 1}.get(str(self.kind)) or int(self.kind)

    def shape(self, samples: int, channels: int) -> tuple[int, ...]:
        """Of mean and var."""
        return (samples,) if self.kind == "layer" else (samples, self.groups(channels))


def made(
    shape: tuple[int, ...], layout: str, dtype: Any, *, ratio: float = 10.0, seed: int = 0
) -> tuple[Array, ...]:
    """x, dy, a residual, gamma and beta for an NCHW shape; every sample and channel has a mean of
    its own, and they deviate from each other as much as the values about them."""
    rng = np.random.default_rng(seed)
    x, dy, residual = rng.normal(size=(3, *shape))
    each = 1, *shape[1:2], *[1] * (len(shape) - 2)
    x += rng.normal(size=each) + ratio * rng.uniform(-1, 1, (len(x), *[1] * (x.ndim - 1)))
    arrays = (to_layout(a, layout).astype(dtype) for a in (x, dy, residual))
    return *arrays, *rng.normal(size=(2, shape[1]))


def judge_forward(
    result: fastbn.BatchNormResult,
    groups: int,
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    residual: Array | None = None,
) -> list[Judged]:
    """What a forward gave for these arguments, beside what it should."""
    dtype = np.dtype(x.dtype.type)
    n, c, places = by_sample(x, layout).shape
    mean, var, bn, bound = _exact_forward(x, groups, gamma, beta, eps, layout)
    z = None if residual is None else by_sample(residual, layout)
    exact = fused(bn, activation, z)
    if activation is not None or z is not None:
        bound = bound_fused(dtype, bound, bn if z is None else bn + z, exact)
    y = by_sample(result.y, layout).astype(dtype)
    found_mean, found_var = (a.reshape(n, groups) for a in result[1:])
    return [
        Judged(found_mean, mean, bound_mean(mean, var, eps), "mean"),
        Judged(found_var, var, bound_sample_var(mean, var, c, places), "var"),
        Judged(y, exact, stored(dtype, exact, bound), "y"),
    ]


@memoized
def _exact_forward(
    x: Array, groups: int, gamma: Array | None, beta: Array | None, eps: float, layout: str
) -> tuple[Wide, Wide, Wide, Wide]:
    """Statistics, normalized values and their bound."""
    values, of_gamma = by_sample(x, layout), np.float32 if gamma is None else gamma.dtype
    g, b = vector(gamma, 1, values.shape[1]), vector(beta, 0, values.shape[1])
    mean, var = sample_moments(values, groups)
    bn = sample_normalize(values, mean, var, g, b, eps)
    return mean, var, bn, bound_sample_y(x.dtype.type, of_gamma, bn, mean, var, g, b, eps)


def judge_backward(
    got: Any,
    groups: int,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    y: Array | None = None,
    dsum: Array | None = None,
) -> list[Judged]:
    """What a backward gave for these arguments, beside what it should."""
    d, values, dtype = by_sample(dy, layout), by_sample(x, layout), np.dtype(x.dtype.type)
    n, c, _ = values.shape
    m, v = (a.astype(np.longdouble).reshape(n, groups) for a in (mean, var))
    g = vector(gamma, 1, c)
    of_parameters = np.dtype(dtype if dtype.itemsize > 2 else np.float32)
    if gamma is not None:
        of_parameters = np.dtype(gamma.dtype.type)
    if y is not None:
        d = gated(d, by_sample(y, layout), activation)
    exact = sample_backward(d, values, m, v, g, eps)
    bound = bound_sample_dx(dtype, exact, m, v, eps)
    if y is not None:
        scale = g[:, None] * over_channels(rstd_of(v, eps), c)
        bound = bound_gated(dtype, d * scale, bound)
    dx, expected = by_sample(got.dx, layout).astype(dtype), exact.dx
    if dsum is not None:
        expected = exact.dx + by_sample(dsum, layout)
        bound = bound_added(dtype, expected, bound)
    judged = [Judged(dx, expected, stored(dtype, expected, bound), "dx")]
    if got.dgamma is not None:
        of_dgamma, of_dbeta = bound_sample_sums(of_parameters, exact, m, v, eps)
        assert got.dgamma.dtype == got.dbeta.dtype == of_parameters
        judged.append(Judged(got.dgamma, exact.dgamma, of_dgamma, "dgamma"))
        judged.append(Judged(got.dbeta, exact.dbeta, of_dbeta, "dbeta"))
    if isinstance(got, fastbn.ResidualGradients):
        assert got.dresidual.dtype == dtype
        bound = stored(dtype, d, bound_gated(dtype, d, np.zeros_like(d)))
        dresidual = by_sample(got.dresidual, layout).astype(dtype)
        judged.append(Judged(dresidual, d, bound, "dresidual"))
    return judged


def check(
    norm: Norm,
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    residual: Array | None = None,
    dresidual: Any = False,
    params: bool = True,
    **options: Any,
) -> tuple[fastbn.BatchNormResult, Any]:
    """Both functions are within their bounds; gives what they gave."""
    layout, activation = options.get("layout", "NCHW"), options.get("activation")
    channels, dtype = channels_of(x, layout), np.dtype(x.dtype.type)
    groups = norm.groups(channels)
    result = norm.forward(x, gamma=gamma, beta=beta, residual=residual, **options)
    y, mean, var = result
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert mean.shape == var.shape == norm.shape(len(x), channels)
    assert mean.dtype == var.dtype == np.float64
    for judged in judge_forward(result, groups, x, gamma, beta, residual=residual, **options):
        assert_within(*judged)
    kept = None if activation is None else y
    given, told = (dy, x, mean, var), {"gamma": gamma, "y": kept, **options}
    got = norm.backward(*given, params=params, dresidual=dresidual, **told)
    assert (got.dx.shape, got.dx.dtype) == (x.shape, dtype)
    assert isinstance(got, fastbn.Gradients if dresidual is False else fastbn.ResidualGradients)
    assert (got.dgamma is None) == (got.dbeta is None) == (not params)
    for judged in judge_backward(got, groups, *given, **told):
        assert_within(*judged)
    return result, got
