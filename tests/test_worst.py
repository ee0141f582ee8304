"""Searches for what is worst: Hypothesis climbs the error in units of its bound.

The recipes are wider than those of `strategies`: every scale that the promise covers, of x, dy,
gamma, beta and eps, each by itself. Only channels inside the promised domain are judged; what
happens outside is told by test_special_values.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, target
from hypothesis import strategies as st

import fastbn
from oracle import bounds, formulas
from oracle.arrays import DTYPES, Array, Wide, rows, to_layout, wide
from oracle.bounds import unit
from support.judge import check_backward, judge_backward, judge_forward
from support.memory import FORMS
from support.strategies import DISTRIBUTIONS, layouts
from support.variants import Variant

LIMITS: dict[Any, float] = {np.float32: 1e6, np.float64: 1e12}
"""Of |mean|/s."""
EXPONENTS: dict[Any, float] = {np.float32: 38.0, np.float64: 153.0}
"""Of ten: the deviations whose variances and their reciprocals are normal float64 numbers."""
SAMPLES = (1, 2, 3, 15, 16, 17, 33, 511, 512, 513)
PLACES = (1, 2, 7, 15, 16, 17, 31, 33, 49, 1000, 8193)
CHANNELS = (1, 2, 3, 15, 16, 17, 33, 65)
MOST = 1 << 15  # values: a little more than one chunk


@dataclass(frozen=True)
class Recipe:
    """A problem in words: exponents of ten, kinds and a seed."""

    dtype: Any
    layout: str
    form: str
    shape: tuple[int, int, int]
    kind: str
    outlier: tuple[int, float] | None
    """Its place and its exponent, in deviations."""
    exponents: dict[str, float]
    eps: float
    seed: int

    def values(self) -> tuple[Array, Array, Array, Array]:
        """x, dy, gamma and beta; in the recipe's layout and memory form."""
        rng = np.random.default_rng(self.seed)
        ten = {name: 10.0**exponent for name, exponent in self.exponents.items()}
        noise = DISTRIBUTIONS[self.kind](rng, self.shape)
        if self.outlier is not None:
            place, size = self.outlier
            noise[(place // 7 % self.shape[0], slice(None), place % self.shape[2])] = 10.0**size
        x = (rng.choice([-1, 1]) * ten["ratio"] + noise) * ten["deviation"]
        dy = ten["dy"] * (rng.normal(size=self.shape) + ten["lean"] * np.sign(noise))
        dy += ten["dy"] * (ten["dy ratio"] - 0.1)
        signs = rng.choice([-1, 1], (2, self.shape[1])) * rng.uniform(1, 10, (2, self.shape[1]))
        gamma, beta = signs[0] * ten["gamma"], signs[1] * ten["beta"]
        with np.errstate(over="ignore"):
            x, dy, gamma, beta = (a.astype(self.dtype) for a in (x, dy, gamma, beta))
        x, dy = (FORMS[self.form](to_layout(a, self.layout)) for a in (x, dy))
        return x, dy, gamma, beta


def exponent(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda e: round(e, 2))


@st.composite
def extremes(draw: st.DrawFn) -> Recipe:
    """Any recipe whose values are those of its type."""
    dtype = draw(st.sampled_from(DTYPES))
    most = EXPONENTS[dtype]
    samples, places = draw(st.sampled_from(SAMPLES)), draw(st.sampled_from(PLACES))
    while samples * places > MOST:
        places = places // 8
    channels = draw(st.sampled_from([c for c in CHANNELS if samples * places * c <= MOST]))
    of_ten = {
        "deviation": exponent(-most, most),
        "ratio": exponent(-3, np.log10(LIMITS[dtype])),
        "dy": exponent(-most, most),
        "dy ratio": exponent(-3, 6),
        "lean": exponent(-3, 6),
        "gamma": exponent(-most, most),
        "beta": exponent(-most, most),
    }
    near_one = draw(st.sets(st.sampled_from(sorted(of_ten))))
    return Recipe(
        dtype,
        draw(layouts),
        draw(st.sampled_from(["dense", "channels-last", "strided", "unlucky"])),
        (samples, channels, places),
        draw(st.sampled_from(sorted(DISTRIBUTIONS))),
        draw(st.none() | st.tuples(st.integers(0, 9999), exponent(0, 30))),
        {name: 0.0 if name in near_one else draw(of_ten[name]) for name in of_ten},
        draw(st.just(0.0) | exponent(-most, 3).map(lambda e: 10.0**e)),
        draw(st.integers(0, 99)),
    )


def fits(*values: Any, dtype: Any = np.float64) -> Array:
    """Whether the largest magnitudes are finite in a type, with room for an error."""
    return np.asarray(np.asarray([v < np.finfo(dtype).max / 2 for v in values]).all(0))


def promised(r: Recipe, x: Array, var: Wide, mean: Wide) -> Array:
    """The channels whose statistics are in the domain of the promise."""
    normal = float(np.finfo(np.float64).smallest_normal)
    with np.errstate(all="ignore"):
        inside = (var == 0) | ((var >= normal) & (1 / var >= normal))
        inside &= abs(mean) * formulas.rstd_of(var, r.eps) <= LIMITS[r.dtype]
    return np.asarray(inside & np.isfinite(rows(x, r.layout)).all(1))


def worst_of(r: Recipe) -> dict[str, float]:
    """The largest error of each result, in units of its bound, over the promised channels."""
    x, dy, gamma, beta = r.values()
    options: dict[str, Any] = {"eps": r.eps, "layout": r.layout}
    result = fastbn.batch_norm(x, gamma, beta, **options)
    with np.errstate(all="ignore"):
        judged = judge_forward(result, x, gamma, beta, **options)
        mean, var = (j.expected for j in judged[:2])
        inside = promised(r, x, var, mean)
        inside &= fits(*abs(rows(dy, r.layout).T), abs(gamma), abs(beta), dtype=r.dtype)
        products = wide(dy, r.layout) * (wide(x, r.layout) - mean[:, None])
        inside &= fits(abs(products).sum(1))
        statistics = np.where(inside, result.mean, 0), np.where(inside, result.var, 1)
        for frozen in (False, True):
            verb = fastbn.normalize_backward if frozen else fastbn.batch_norm_backward
            got = verb(dy, x, *statistics, gamma, **options)
            backward = judge_backward(got, dy, x, *statistics, gamma, **options, frozen=frozen)
            judged += [j._replace(what="frozen " * frozen + j.what) for j in backward]
        worst = {}
        for actual, expected, bound, what in judged:
            units = bounds.units(actual, expected, bound).reshape(inside.size, -1).max(1)
            # The terms of dx may be larger than their sum; the bound is a part of theirs.
            terms = bound / (4 * unit(r.dtype)) if what.endswith("dx") else 0 * bound
            sizes = np.maximum(abs(expected), terms).reshape(inside.size, -1).max(1)
            chosen = inside & fits(sizes, dtype=actual.dtype)
            worst[what] = float(units[chosen].max(initial=0))
    return worst


SUBNORMAL = {"deviation": 77.88, "ratio": 0.0, "dy": -82.0, "dy ratio": 0.0, "lean": -1.0}
SUBNORMAL |= {"gamma": -153.0, "beta": 0.0}
"""Of a dx below the normal numbers in all of its terms."""


@settings(max_examples=200)
@given(extremes())
@example(Recipe(np.float64, "NCHW", "dense", (3, 1, 2), "constant", (0, 1.75), SUBNORMAL, 0.0, 0))
def test_nothing_is_worse_than_promised(variant: Variant, r: Recipe) -> None:
    """No result anywhere in the domain is further off than its bound."""
    with fastbn.use_num_threads(1):
        worst = worst_of(r)
    for what, units in worst.items():
        target(min(units, 1e9), label=what)
    assert max(worst.values()) <= 1, worst


@pytest.mark.parametrize("scales", [(1e-150, 1e-100, 1e150), (1e150, 1e50, -1e-150)], ids=str)
def test_dx_where_one_over_s_twice_is_no_float64(
    variant: Variant, scales: tuple[float, float, float]
) -> None:
    """gamma / s**2 may be out of range where dx itself is not."""
    of_x, of_dy, of_gamma = scales
    x, dy = np.array([[-1.0], [0.5], [3.0]]) * of_x, np.array([[1.0], [-2.0], [5.0]]) * of_dy
    mean, var = fastbn.moments(x)
    check_backward(dy, x, mean, var, np.array([of_gamma]), eps=0.0)
