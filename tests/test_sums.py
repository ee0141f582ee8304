"""`gradient_sums` and the gradient by sums: parts of a batch have the gradient of the whole."""

from __future__ import annotations

from functools import partial, reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from oracle import formulas
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array, channels_of, to_layout, vector, wide
from oracle.bounds import bound_dbeta, bound_dgamma
from oracle.formulas import ACTIVATIONS
from support.bits import assert_same_bits
from support.judge import assert_within, judge_backward
from support.pairs import paired
from support.strategies import Problem, recipes
from support.variants import each_backend

pytestmark = pytest.mark.usefixtures("variant")

ALL = (*DTYPES, *HALVES)
activations = st.sampled_from(ACTIVATIONS)
Total = tuple[Array, Array, float]


@st.composite
def divided(draw: st.DrawFn) -> tuple[Problem, list[slice]]:
    """A problem, and its samples in up to four parts; some may be empty."""
    p = draw(recipes(ALL))
    n = len(p.x)
    ends = [0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n]
    return p, [slice(a, b) for a, b in pairwise(ends)]


def added(sums: list[fastbn.GradientSums]) -> Total:
    """Those of the whole."""
    dgamma, dbeta, count = (sum(field) for field in zip(*sums, strict=True))
    return dgamma, dbeta, count


def more(parts: int) -> float:
    """What bounds grow by where sums of parts are added up.

    The bounds of the parts' sums contain 2**-52 times n times the mean magnitude for each part, and
    each addition rounds by half of that. Sums are allowed 1e-12 of the same, and dx twice that.
    """
    return 1 + 2 * parts * 2.0**-52 / 1e-12


def check_sums(
    sums: fastbn.GradientSums,
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    *,
    eps: float = 1e-5,
    layout: str = "NCHW",
    activation: Any = None,
    y: Array | None = None,
) -> None:
    """They are within the bounds of float64 gradients of parameters."""
    c = channels_of(x, layout)
    assert sums.count == x.size // c
    assert sums.dgamma.dtype == sums.dbeta.dtype == np.float64
    d, m, v = wide(dy, layout), vector(mean, 0, c), vector(var, 1, c)
    if y is not None:
        d = formulas.gated(d, wide(y, layout), activation)
    one = vector(None, 1, c)
    exact = formulas.backward(d, wide(x, layout), m, v, one, eps, frozen=True)
    for name, bound in (("dgamma", bound_dgamma), ("dbeta", bound_dbeta)):
        off = bound(np.float64, exact, m, v, eps)
        assert_within(getattr(sums, name), getattr(exact, name), off, name)


@given(divided(), activations)
def test_parts_have_the_gradient_of_the_whole(
    divided: tuple[Problem, list[slice]], activation: Any
) -> None:
    """By merged moments and added sums: dx, dgamma, dbeta and dresidual are within the bounds of
    the whole's, and each part's sums within their own."""
    p, parts = divided
    whole = reduce(
        fastbn.Moments.merge, (fastbn.Moments.of(p.x[part], layout=p.layout) for part in parts)
    )
    by = whole.mean, whole.var
    options: dict[str, Any] = p.options | {"activation": activation}
    y = None if activation is None else fastbn.normalize(p.x, *by, p.gamma, p.beta, **options)

    def of(part: slice) -> tuple[tuple[Array, ...], dict[str, Any]]:
        """The arguments for a part."""
        return (p.dy[part], p.x[part], *by), options | {"y": None if y is None else y[part]}

    sums = []
    for arrays, rest in map(of, parts):
        sums.append(fastbn.gradient_sums(*arrays, **rest))
        if arrays[0].size:
            check_sums(sums[-1], *arrays, **rest)
    verb: Any = partial(fastbn.batch_norm_backward, sums=added(sums), dresidual=True)
    found = [verb(*arrays, p.gamma, **rest) for arrays, rest in map(of, parts)]
    for other in found:
        np.testing.assert_array_equal(other[1:3], found[0][1:3])
    dx, dresidual = (np.concatenate([getattr(f, n) for f in found]) for n in ("dx", "dresidual"))
    got = fastbn.ResidualGradients(dx, found[0].dgamma, found[0].dbeta, dresidual)
    for judged in judge_backward(got, p.dy, p.x, *by, p.gamma, **options, y=y):
        assert_within(*judged._replace(bound=judged.bound * more(len(parts))))


SHAPES = [(6, 5), (2, 20_003), (4, 3, 5, 7), (9, 24, 30, 31)]
"""The second has so many channels that they are worked on in parts."""


def problem(shape: tuple[int, ...], layout: str, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """dy, x and the moments of a batch of which x is a part."""
    rng = np.random.default_rng(0)
    dy, x = (to_layout(a, layout).astype(dtype) for a in rng.normal(3, 2, (2, *shape)))
    return dy, x, rng.normal(3, 1, shape[1]), rng.exponential(size=shape[1]) + 1


def total_of(channels: int) -> Total:
    """Sums of some larger batch."""
    dgamma, dbeta = np.random.default_rng(1).normal(0, 1e3, (2, channels))
    return dgamma, dbeta, 1_000_000


@each_backend
@paired(shape=SHAPES, dtype=ALL, layout=LAYOUTS)
def test_options_change_no_bit(shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """Fresh, into `out` or in place, with the residual's gradient and without, dx has the same
    bits; without the parameters' gradients too."""
    dy, x, mean, var = problem(shape, layout, dtype)
    rest: dict[str, Any] = {"layout": layout, "sums": total_of(shape[1])}
    gamma = np.linspace(-2, 2, shape[1])
    expected = fastbn.batch_norm_backward(dy, x, mean, var, gamma, **rest)
    lone = fastbn.batch_norm_backward(dy, x, mean, var, gamma, params=False, **rest)
    assert lone[1:] == (None, None)
    assert_same_bits({"dx": lone.dx}, {"dx": expected.dx})
    for name in ("dy", "x", "out"):
        mine = {"dy": dy.copy(), "x": x.copy(), "out": np.empty_like(x)}
        out = mine[name]
        got = fastbn.batch_norm_backward(mine["dy"], mine["x"], mean, var, gamma, out=out, **rest)
        assert got.dx is out
        assert_same_bits(got._asdict(), expected._asdict())
    into = dy.copy()
    beside = fastbn.batch_norm_backward(into, x, mean, var, gamma, dresidual=into, **rest)
    assert beside.dresidual is into
    assert_same_bits(beside._asdict(), expected._asdict() | {"dresidual": dy})


@paired(shape=SHAPES, dtype=ALL, layout=LAYOUTS)
def test_sums_of_larger_arrays(shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """They, and the gradients by them, are within their bounds and have the same bits by several
    threads."""
    dy, x, mean, var = problem(shape, layout, dtype)
    found = []
    for threads in (1, 3):
        with fastbn.use_num_threads(threads):
            sums = fastbn.gradient_sums(dy, x, mean, var, layout=layout)
            got = fastbn.batch_norm_backward(dy, x, mean, var, layout=layout, sums=sums)
        found.append({"dgamma": sums.dgamma, "dbeta": sums.dbeta, "dx": got.dx})
    assert_same_bits(found[1], found[0])
    check_sums(sums, dy, x, mean, var, layout=layout)
    for judged in judge_backward(got, dy, x, mean, var, layout=layout):
        assert_within(*judged._replace(bound=judged.bound * more(1)))


@each_backend
@pytest.mark.parametrize("gamma_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", ALL)
def test_gradients_of_parameters_are_the_sums_given(dtype: Any, gamma_dtype: Any) -> None:
    """In gamma's type or, without gamma, in x's; float32 beside half types. What came is neither
    changed nor given back."""
    dy, x, mean, var = problem((4, 3, 5, 7), "NCHW", dtype)
    total = total_of(3)
    kept = [a.copy() for a in total[:2]]
    gamma = None if gamma_dtype is None else np.ones(3, gamma_dtype)
    got = fastbn.batch_norm_backward(dy, x, mean, var, gamma, sums=total)
    wanted = gamma_dtype or (dtype if np.dtype(dtype).itemsize > 2 else np.float32)
    for ours, copied, gradient in zip(total, kept, got[1:], strict=False):
        assert gradient is not None
        np.testing.assert_array_equal(gradient, copied.astype(wanted), strict=True)
        assert not np.shares_memory(gradient, ours)
        np.testing.assert_array_equal(ours, copied)


@each_backend
@pytest.mark.parametrize("place", ["dy", "x", "mean", "var"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(value: float, place: str) -> None:
    """Sums and dx of other channels keep their bits, and nothing warns."""
    names = ("dy", "x", "mean", "var")
    found = []
    for bad in (0.5, value):
        given: dict[str, Any] = dict(zip(names, problem((5, 3), "NCHW", np.float32), strict=True))
        given[place][..., 1] = bad
        sums = fastbn.gradient_sums(**given)
        dx = fastbn.batch_norm_backward(**given, sums=sums).dx
        results = {"dgamma": sums.dgamma, "dbeta": sums.dbeta, "dx": dx}
        found.append({name: np.delete(a, 1, -1) for name, a in results.items()})
    assert_same_bits(found[1], found[0])


@each_backend
def test_sums_as_reductions_leave_them() -> None:
    """A list, and a count that is an array of it alone, of whole numbers or others."""
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 4, 5))
    mean, var = fastbn.moments(x)
    dgamma, dbeta, n = fastbn.gradient_sums(dy, x, mean, var)
    backward = partial(fastbn.batch_norm_backward, dy, x, mean, var)
    expected = backward(sums=(dgamma, dbeta, n))._asdict()
    for count in (np.array(n), np.array(n, np.int32), np.array(float(n)), np.array(n, "f4")):
        for sums in ([dgamma, dbeta, count], (dgamma, dbeta, count)):
            assert_same_bits(backward(sums=sums)._asdict(), expected)
    assert fastbn.Moments(np.array(n), mean, var) == fastbn.Moments(n, mean, var)


def test_where_nothing_varies() -> None:
    """Where var + eps is 0, the sum dgamma is 0, and so is dx."""
    dy = np.random.default_rng(0).normal(size=(4, 3, 5))
    x, mean, var = np.full_like(dy, 7), np.full(3, 7.0), np.zeros(3)
    sums = fastbn.gradient_sums(dy, x, mean, var, eps=0.0)
    assert (sums.dgamma == 0).all()
    assert (fastbn.batch_norm_backward(dy, x, mean, var, eps=0.0, sums=sums).dx == 0).all()


PARTS = (slice(6), slice(6, 8), slice(8, 12), slice(12, 20))


def by_parts(weights: Array, where: Array, layout: str) -> tuple[list[Array], Array]:
    """dx of parts whose samples weigh, by the sums of all, and of the batch in one call."""
    dy, x, *_ = problem((20, 3, 5), layout, np.float32)
    whole = fastbn.Moments.of(x, layout=layout, where=where, weights=weights)
    by = whole.mean, whole.var

    def of(part: slice) -> dict[str, Any]:
        return {"layout": layout, "where": where[part], "weights": weights[part]}

    sums = [fastbn.gradient_sums(dy[p], x[p], *by, **of(p)) for p in PARTS]
    total = added(sums)
    assert np.isclose(total[2], float(whole.count), rtol=1e-12, atol=0)
    dx = [fastbn.batch_norm_backward(dy[p], x[p], *by, sums=total, **of(p)).dx for p in PARTS]
    return dx, fastbn.batch_norm_backward(dy, x, *by, **of(slice(None))).dx


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_whose_samples_weigh(layout: str) -> None:
    """By sums of parts dx is that of the whole, at any scale of the weights the same bits; of parts
    whose own scales have nothing in common, too, one that weighs nothing among them."""
    rng = np.random.default_rng(3)
    where = rng.random((20, 1, 5) if layout == "NCHW" else (20, 5, 1)) < 0.8
    weights = rng.integers(1, 9, 20) / 8
    weights[PARTS[2]] = 0
    dx, whole = by_parts(weights, where, layout)
    np.testing.assert_allclose(np.concatenate(dx), whole, rtol=1e-5, atol=1e-6)
    for scale in (2.0**1000, 2.0**-1060):
        scaled, _ = by_parts(weights * scale, where, layout)
        assert_same_bits({"dx": np.concatenate(scaled)}, {"dx": np.concatenate(dx)})
    weights[PARTS[0]] *= 2.0**-1060
    weights[PARTS[1]] *= 2.0**1000
    dx, whole = by_parts(weights, where, layout)
    np.testing.assert_allclose(np.concatenate(dx), whole, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_an_empty_part(shape: tuple[int, ...]) -> None:
    """Its sums are zeros; by the sums of all, its dx is empty and its dgamma and dbeta are
    theirs."""
    x, mean, var = np.zeros(shape, np.float32), np.zeros(3), np.ones(3)
    sums = fastbn.gradient_sums(x, x, mean, var)
    assert sums.count == 0
    np.testing.assert_array_equal((sums.dgamma, sums.dbeta), np.zeros((2, 3)))
    total = total_of(3)
    got = fastbn.batch_norm_backward(x, x, mean, var, sums=total)
    assert got.dx.shape == shape
    np.testing.assert_array_equal(got[1:], np.array(total[:2]).astype(np.float32), strict=True)
    assert fastbn.batch_norm_backward(x, x, mean, var, params=False, sums=total)[1:] == (None, None)
