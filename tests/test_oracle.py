"""The oracles themselves, against exact rational arithmetic and correctly rounded sums."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from oracle import formulas
from oracle.arrays import rows, vector, wide
from support.judge import assert_within


@pytest.mark.parametrize("loc", [0.0, 1e6, 1e12])
def test_moments_agree_with_rational_arithmetic(loc: float) -> None:
    """The oracle's mean and variance are far closer to the exact ones than any bound."""
    values = np.random.default_rng(0).normal(loc, 1, (2, 57))
    mean, var = formulas.moments(values.astype(np.longdouble))
    for row in range(2):
        exact = [Fraction(v) for v in values[row].tolist()]
        m = sum(exact) / len(exact)
        v = sum((e - m) ** 2 for e in exact) / len(exact)
        # One longdouble holds a float64 and what is left of a value after it.
        top, rest = float(m), float(m - Fraction(float(m)))
        assert (
            abs(mean[row] - (np.longdouble(top) + np.longdouble(rest))) <= 1e-18 * abs(loc) + 1e-18
        )
        assert abs(float(var[row]) - float(v)) <= 1e-15 * float(v)


def test_sums_agree_with_fsum() -> None:
    """The oracle's dbeta and dgamma are the correctly rounded sums."""
    x, dy = np.random.default_rng(0).normal(3, 1, (2, 4, 129))
    zero, one = np.zeros(4, np.longdouble), np.ones(4, np.longdouble)
    wide_dy, wide_x = dy.astype(np.longdouble), x.astype(np.longdouble)
    got = formulas.backward(wide_dy, wide_x, zero, one, one, 0.0, frozen=True)
    for row in range(4):
        assert float(got.dbeta[row]) == math.fsum(dy[row])
        products = [Fraction(a) * Fraction(b) for a, b in zip(dy[row], x[row], strict=True)]
        assert float(got.dgamma[row]) == float(sum(products))


def test_oracle_agrees_with_the_textbook() -> None:
    """Rows in extended precision and the printed formula are the same function."""
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 5))
    gamma, beta = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 2.0])
    values = wide(x, "NCHW")
    mean, var = formulas.moments(values)
    y = formulas.normalize(values, mean, var, vector(gamma, 1, 3), vector(beta, 0, 3), 1e-5)
    printed = formulas.textbook(x, gamma, beta, 1e-5, "NCHW")
    np.testing.assert_allclose(rows(printed, "NCHW"), y.astype(float), rtol=1e-13)


def test_assert_within_catches_a_nan_and_an_error() -> None:
    """The comparison that every test leans on does fail."""
    one = np.ones(3)
    assert_within(one, one, 0.0, "equal")
    for wrong in (np.array([1.0, np.nan, 1.0]), np.array([1.0, 1.0, 1.1])):
        with pytest.raises(AssertionError, match="1 of 3 wrong"):
            assert_within(wrong, one, 0.05, "y")


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_oracle_of_samples_is_that_of_batches(groups: int) -> None:
    """Each sample's group, by itself, as a batch of one channel; gamma and beta apart."""
    x, dy = np.random.default_rng(0).normal(2, 3, (2, 4, 6, 5)).astype(np.longdouble)
    gamma, beta = np.random.default_rng(1).normal(size=(2, 6)).astype(np.longdouble)
    mean, var = formulas.sample_moments(x, groups)
    y = formulas.sample_normalize(x, mean, var, gamma, beta, 1e-5)
    got = formulas.sample_backward(dy, x, mean, var, gamma, 1e-5)
    one, zero = np.ones(1, np.longdouble), np.zeros(1, np.longdouble)
    dgamma = np.zeros((4, 6, 5), np.longdouble)
    size = 6 // groups
    for n, g in np.ndindex(4, groups):
        at = n, slice(g * size, (g + 1) * size)
        values, scale = x[at].reshape(1, -1), gamma[at[1], None]
        m, v = formulas.moments(values)
        assert (m, v) == (mean[n, g], var[n, g])
        xhat = formulas.normalize(values, m, v, one, zero, 1e-5).reshape(size, -1)
        np.testing.assert_allclose(y[at], xhat * scale + beta[at[1], None], rtol=1e-15)
        scaled = (dy[at] * scale).reshape(1, -1)
        alone = formulas.backward(scaled, values, m, v, one, 1e-5, frozen=False)
        np.testing.assert_allclose(got.dx[at], alone.dx.reshape(size, -1), rtol=1e-12, atol=1e-16)
        dgamma[at] = dy[at] * xhat
    np.testing.assert_allclose(got.dgamma, dgamma.sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(got.dbeta, dy.sum((0, 2)), rtol=1e-15)
