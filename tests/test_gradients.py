"""The gradients against complex-step derivatives of the textbook formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastbn
from oracle import formulas
from oracle.arrays import DTYPES, LAYOUTS, Array, channels_of, rows, to_layout, vector, wide
from oracle.bounds import bound_dbeta, bound_dgamma, bound_dx
from support.judge import assert_within, derivative
from support.pairs import paired
from support.variants import Variant, each_backend


@paired(
    dtype=DTYPES,
    layout=LAYOUTS,
    frozen=[True, False],
    with_gamma=[True, False],
    with_beta=[True, False],
    params=[True, False],
)
def test_gradients_are_the_derivatives(
    variant: Variant,
    dtype: Any,
    layout: str,
    frozen: bool,
    with_gamma: bool,
    with_beta: bool,
    params: bool,
) -> None:
    """dx, dgamma and dbeta are the derivatives of sum(dy * y), training and frozen."""
    rng = np.random.default_rng(1)
    x = to_layout(rng.normal(1.5, 2, (3, 3, 2, 2)), layout).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    gamma = np.array([1.5, -0.5, 2.0], dtype) if with_gamma else None
    beta = np.array([0.25, -1.0, 3.0], dtype) if with_beta else None
    eps = 0.125
    full_gamma = vector(gamma, 1, 3).astype(np.float64)
    full_beta = vector(beta, 0, 3).astype(np.float64)
    if frozen:
        mean, var = rng.normal(size=3), rng.exponential(size=3)
    else:
        _, mean, var = fastbn.batch_norm(x, gamma, beta, eps=eps, layout=layout)

    def loss(x: Array, gamma: Array, beta: Array) -> complex:
        if frozen:
            y = formulas.textbook_frozen(x, mean, var, gamma, beta, eps, layout)
        else:
            y = formulas.textbook(x, gamma, beta, eps, layout)
        return complex((dy * y).sum())

    verb = fastbn.normalize_backward if frozen else fastbn.batch_norm_backward
    got = verb(dy, x, mean, var, gamma, eps=eps, layout=layout, params=params)
    d, m, v, g = (
        wide(dy, layout),
        mean.astype(np.longdouble),
        var.astype(np.longdouble),
        vector(gamma, 1, 3),
    )
    exact = formulas.backward(d, wide(x, layout), m, v, g, eps, frozen=frozen)
    doubles = x.astype(np.float64)
    dx = derivative(lambda x: loss(x, full_gamma, full_beta), doubles)
    bound = bound_dx(dtype, exact, d, m, v, g, eps, frozen=frozen)
    assert_within(rows(got.dx, layout), wide(dx, layout), bound, "dx")
    if not params:
        assert got.dgamma is None
        assert got.dbeta is None
        return
    assert got.dgamma is not None
    assert got.dbeta is not None
    dgamma = derivative(lambda gamma: loss(doubles, gamma, full_beta), full_gamma)
    dbeta = derivative(lambda beta: loss(doubles, full_gamma, beta), full_beta)
    assert_within(got.dgamma, dgamma, bound_dgamma(dtype, exact, m, v, eps), "dgamma")
    assert_within(got.dbeta, dbeta, bound_dbeta(dtype, exact, m, v, eps), "dbeta")


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_params_false_gives_the_same_dx(variant: Variant, dtype: Any, layout: str) -> None:
    """Without dgamma and dbeta, dx keeps its bits; frozen, x may be absent."""
    x, dy = np.random.default_rng(2).normal(size=(2, 5, 17, 3)).astype(dtype)
    c = channels_of(x, layout)
    mean, var = np.zeros(c), np.ones(c)
    full = fastbn.batch_norm_backward(dy, x, mean, var, layout=layout)
    alone = fastbn.batch_norm_backward(dy, x, mean, var, layout=layout, params=False)
    np.testing.assert_array_equal(alone.dx, full.dx, strict=True)
    full = fastbn.normalize_backward(dy, x, mean, var, layout=layout)
    for given in (x, None):
        alone = fastbn.normalize_backward(dy, given, mean, var, layout=layout, params=False)
        np.testing.assert_array_equal(alone.dx, full.dx, strict=True)
        assert alone[1:] == (None, None)


@each_backend
@pytest.mark.parametrize("gamma_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_parameters_have_gammas_dtype(
    variant: Variant, dtype: Any, gamma_dtype: Any
) -> None:
    """dgamma and dbeta are of gamma's type, x's where there is none, native in either order."""
    x = np.random.default_rng(3).normal(size=(8, 3)).astype(dtype)
    _, mean, var = fastbn.batch_norm(x)
    swapped = np.ones(3, np.dtype(gamma_dtype).newbyteorder("S"))
    cases: list[tuple[Array | None, type]] = [
        (np.ones(3, gamma_dtype), gamma_dtype),
        (swapped, gamma_dtype),
        (None, dtype),
    ]
    for gamma, wanted in cases:
        for verb in (fastbn.batch_norm_backward, fastbn.normalize_backward):
            got = verb(x, x, mean, var, gamma)
            assert got.dx.dtype == np.dtype(dtype)
            assert got.dgamma is not None
            assert got.dbeta is not None
            assert got.dgamma.dtype == got.dbeta.dtype == np.dtype(wanted)
