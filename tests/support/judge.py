"""One call of the library against its oracle, every value within its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

import fastbn
from oracle.arrays import DTYPES, Array, Wide, channels_of, rows, vector, wide
from oracle.bounds import (
    bound_dbeta,
    bound_dgamma,
    bound_dx,
    bound_fused,
    bound_gated,
    bound_mean,
    bound_var,
    bound_y,
    stored,
    units,
)
from oracle.formulas import WideGradients, backward, fused, gated, moments, normalize, rstd_of
from support.memoized import memoized

COMPLEX_STEP = 1e-200


@contextmanager
def case(*words: object) -> Iterator[None]:
    """One of many cases of a test: what fails in the block says which."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(str, words))}")
        raise


def assert_within(actual: Array, expected: Any, bound: Any, what: str) -> None:
    """Every value is as near what is expected as its bound allows; a NaN anywhere fails."""
    expected, bound = np.broadcast_arrays(expected, bound)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    off = units(actual, expected, bound)
    wrong = off > 1
    if wrong.any():
        worst = np.unravel_index(np.argmax(off), off.shape)
        raise AssertionError(
            f"{what}{[int(i) for i in worst]} is {actual[worst]!r}, expected {expected[worst]!r}: "
            f"{off[worst]} times what is allowed; {int(wrong.sum())} of {off.size} wrong"
        )


def derivative(loss: Callable[[Array], complex], at: Array) -> Array:
    """d loss / d at, value by value; exact to rounding, because nothing is subtracted."""
    gradient = np.empty(at.shape)
    for index in np.ndindex(at.shape):
        moved = at.astype(np.complex128)
        moved[index] += 1j * COMPLEX_STEP
        gradient[index] = loss(moved).imag / COMPLEX_STEP
    return gradient


class Judged(NamedTuple):
    """A result, what is exact, how far from that it may be, and its name."""

    actual: Array
    expected: Wide
    bound: Wide
    what: str


def judge_y(
    y: Array, bn: Wide, bound: Wide, layout: str, activation: Any, residual: Array | None
) -> Judged:
    """A y beside what it should be: normalized values within their bound, and what is fused."""
    dtype = np.dtype(y.dtype.type)
    z = None if residual is None else wide(residual, layout)
    exact = fused(bn, activation, z)
    if activation is not None or z is not None:
        bound = bound_fused(dtype, bound, bn if z is None else bn + z, exact)
    return Judged(rows(y, layout), exact, stored(dtype, exact, bound), "y")


def judge_forward(
    result: fastbn.BatchNormResult,
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    residual: Array | None = None,
) -> list[Judged]:
    """What `batch_norm` gave for these arguments, beside what it should."""
    mean, var = _exact_moments(x, layout)
    bn, bound = _exact_y(x, None, None, gamma, beta, eps, layout)
    return [
        Judged(result.mean, mean, bound_mean(mean, var, eps), "mean"),
        Judged(result.var, var, bound_var(var), "var"),
        judge_y(result.y, bn, bound, layout, activation, residual),
    ]


@memoized
def _exact_moments(x: Array, layout: str) -> tuple[Wide, Wide]:
    return moments(wide(x, layout))


@memoized
def _exact_y(
    x: Array,
    mean: Array | None,
    var: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    layout: str,
) -> tuple[Wide, Wide]:
    """Normalized values by the statistics given, else by x's own, and their bound."""
    c = channels_of(x, layout)
    g, b = vector(gamma, 1, c), vector(beta, 0, c)
    m, v = _exact_moments(x, layout) if mean is None else (vector(mean, 0, c), vector(var, 1, c))
    bn = normalize(wide(x, layout), m, v, g, b, eps)
    return bn, bound_y(np.dtype(x.dtype.type), bn, m, v, g, b, eps)


def check_forward(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    residual: Array | None = None,
) -> fastbn.BatchNormResult:
    """`batch_norm`, `moments` and `normalize` are within their bounds; gives batch_norm's."""
    tail = {"activation": activation, "residual": residual}
    result = fastbn.batch_norm(x, gamma, beta, eps=eps, layout=layout, **tail)
    assert result.y.dtype == np.dtype(x.dtype.type)
    assert result.y.shape == x.shape
    mean, var, y = judge_forward(result, x, gamma, beta, eps=eps, layout=layout, **tail)
    alone = fastbn.moments(x, layout=layout)
    again = mean._replace(actual=alone.mean), var._replace(actual=alone.var)
    for statistic in (mean, var, *again):
        assert statistic.actual.dtype == np.float64
    for judged in (mean, var, y, *again):
        assert_within(*judged)
    for given in DTYPES:
        with np.errstate(over="ignore", under="ignore"):
            m, v = result.mean.astype(given), result.var.astype(given)
        fits = np.isfinite(m) & np.isfinite(v) & ((v != 0) == (result.var != 0))
        if fits.all():
            check_normalize(x, m, v, gamma, beta, eps=eps, layout=layout, **tail)
    return result


def check_normalize(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    residual: Array | None = None,
) -> None:
    """`normalize` by the statistics given is within its bound."""
    tail = {"activation": activation, "residual": residual}
    got = fastbn.normalize(x, mean, var, gamma, beta, eps=eps, layout=layout, **tail)
    assert got.dtype == np.dtype(x.dtype.type)
    bn, bound = _exact_y(x, mean, var, gamma, beta, eps, layout)
    assert_within(*judge_y(got, bn, bound, layout, activation, residual)._replace(what="normalize"))


def judge_backward(
    got: fastbn.Gradients | fastbn.ResidualGradients,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    frozen: bool = False,
    activation: Any = None,
    y: Array | None = None,
) -> list[Judged]:
    """What a backward gave for these arguments, beside what it should."""
    c = channels_of(x, layout)
    dtype = np.dtype(x.dtype.type)
    of_parameters = np.dtype(dtype if dtype.itemsize > 2 else np.float32)
    if gamma is not None:
        of_parameters = np.dtype(gamma.dtype.type)
    m, v, g = vector(mean, 0, c), vector(var, 1, c), vector(gamma, 1, c)
    d, exact, of_dx = _exact_backward(
        dy, x, mean, var, gamma, eps=eps, layout=layout, frozen=frozen, activation=activation, y=y
    )
    dx, dgamma, dbeta = got[:3]
    assert dgamma is not None
    assert dbeta is not None
    assert dx.dtype == dtype
    assert dgamma.dtype == dbeta.dtype == of_parameters
    bound = of_dx
    if y is not None:
        bound = bound_gated(dtype, d * (g * rstd_of(v, eps))[:, None], bound)
    judged = [
        Judged(rows(dx, layout), exact.dx, stored(dtype, exact.dx, bound), "dx"),
        Judged(dgamma, exact.dgamma, bound_dgamma(of_parameters, exact, m, v, eps), "dgamma"),
        Judged(dbeta, exact.dbeta, bound_dbeta(of_parameters, exact, m, v, eps), "dbeta"),
    ]
    if isinstance(got, fastbn.ResidualGradients):
        assert got.dresidual.dtype == dtype
        bound = stored(dtype, d, bound_gated(dtype, d, np.zeros_like(d)))
        judged.append(Judged(rows(got.dresidual, layout), d, bound, "dresidual"))
    return judged


@memoized
def _exact_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    *,
    eps: float,
    layout: str,
    frozen: bool,
    activation: Any,
    y: Array | None,
) -> tuple[Wide, WideGradients, Wide]:
    """dy, gated; the gradients; and the bound of dx but for the gate."""
    c = channels_of(x, layout)
    d, m, v, g = wide(dy, layout), vector(mean, 0, c), vector(var, 1, c), vector(gamma, 1, c)
    if y is not None:
        d = gated(d, wide(y, layout), activation)
    exact = backward(d, wide(x, layout), m, v, g, eps, frozen=frozen)
    return d, exact, bound_dx(np.dtype(x.dtype.type), exact, d, m, v, g, eps, frozen=frozen)


def check_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    frozen: bool = False,
    activation: Any = None,
    y: Array | None = None,
    dresidual: Any = False,
) -> fastbn.Gradients | fastbn.ResidualGradients:
    """`batch_norm_backward`, or (`frozen`) `normalize_backward`, is within its bounds."""
    verb: Any = fastbn.normalize_backward if frozen else fastbn.batch_norm_backward
    options: dict[str, Any] = {"eps": eps, "layout": layout, "activation": activation, "y": y}
    got: fastbn.Gradients | fastbn.ResidualGradients
    got = verb(dy, x, mean, var, gamma, dresidual=dresidual, **options)
    options["frozen"] = frozen
    for judged in judge_backward(got, dy, x, mean, var, gamma, **options):
        assert_within(*judged)
    return got


def check_everything(
    x: Array,
    dy: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
) -> None:
    """All five functions on one problem."""
    _, mean, var = check_forward(x, gamma, beta, eps=eps, layout=layout)
    for frozen in (False, True):
        check_backward(dy, x, mean, var, gamma, eps=eps, layout=layout, frozen=frozen)
