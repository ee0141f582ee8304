"""`Moments`: those of parts, merged or summed, are those of the whole; populations of batches.

A moment of a part is within its bound in docs/numerics.md. What merging and summing make of that,
and how often they round, is followed here step by step: `Known` are exact moments and how far from
them the library's may be.
"""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastbn
from fastbn import Moments
from oracle import formulas
from oracle.arrays import DTYPES, HALVES, LAYOUTS, Array, Wide, to_layout, wide
from oracle.bounds import bound_mean, bound_var
from support.bits import assert_same_bits
from support.judge import assert_within
from support.variants import each_backend

T = TypeVar("T")
U = 2.0**-52
"""Twice the relative error of a rounding: what is left over covers products of errors."""
FARTHEST: dict[Any, float] = {np.float32: 1e6, np.float64: 1e12}
"""Up to which |mean| / s there are promises."""
CHANNELS = 3


class Known(NamedTuple):
    """Exact moments, and how far from them others may be."""

    count: int  # type: ignore[assignment]  # in place of tuple.count
    mean: Wide
    var: Wide
    mean_off: Wide
    var_off: Wide


def known(x: Array, layout: str = "NCHW") -> Known:
    """Of an array, for what `fastbn.moments` gives."""
    values = wide(x, layout)
    if not values.size:
        return Known(0, *np.zeros((4, len(values)), np.longdouble))
    mean, var = formulas.moments(values)
    off = bound_mean(mean, var, 0.0), bound_var(var)
    return Known(values.shape[1], mean, var, *off)


def merged(a: Known, b: Known) -> Known:
    """Of both, for what `merge` gives.

    With weights h and t, d = b.mean - a.mean is off by e, the sum of the means' errors.
    mean = a.mean + t d: t, d and their product are rounded, and the sum.
    var = h a.var + t b.var + h d t d: a value goes through up to eight roundings, and none is
    subtracted; d off by e changes h t d**2 by h t (2 |d| e + e**2).
    """
    if not a.count or not b.count:
        return a if not b.count else b
    count = a.count + b.count
    h, t = np.longdouble(a.count) / count, np.longdouble(b.count) / count
    d, e = b.mean - a.mean, a.mean_off + b.mean_off
    mean, var = a.mean + t * d, h * a.var + t * b.var + h * t * d**2
    mean_off = h * a.mean_off + t * b.mean_off
    var_off = h * a.var_off + t * b.var_off + h * t * (2 * abs(d) * e + e**2)
    mean_off += U * (abs(mean) + mean_off + 2 * t * (abs(d) + e))
    return Known(count, mean, var, mean_off, var_off + 5 * U * (var + var_off))


def summed(parts: list[Known], whole: Known, about: Array | None) -> Known:
    """Of all, for what `from_sums` makes of added `to_sums`.

    For P parts with means a_i from `about`, A the whole's: sum(n_i (var_i + a_i**2)) goes through
    P + 4 roundings, sum(n_i a_i) through P + 1, each of at most count * sqrt(var + A**2), by
    Cauchy-Schwarz; two quotients, a square and a difference follow. In all the variance is off by
    less than (2 P + 6) U (var + A**2). That is the docstring's loss of log2(1 + (A / s)**2) bits.
    What the parts' means are off by changes it by 2 s e + e**2 at most, e the largest.
    """
    if not whole.count:
        return whole
    filled = [part for part in parts if part.count]
    apart = whole.mean - (0 if about is None else about.astype(np.longdouble))
    square = whole.var + apart**2
    e = np.max([part.mean_off for part in filled], 0)
    mean_off = e + (len(parts) + 2) * U * np.sqrt(square) + U * abs(whole.mean)
    var_off = np.max([part.var_off for part in filled], 0) + 2 * np.sqrt(whole.var) * e + e**2
    return whole._replace(
        mean_off=mean_off, var_off=var_off + (2 * len(parts) + 6) * U * (square + var_off)
    )


def assert_known(got: Moments, exact: Known, allowed: Known) -> None:
    """Moments are those of some values, as near as is allowed."""
    assert got.count == exact.count
    assert_within(got.mean, exact.mean, allowed.mean_off, "mean")
    assert_within(got.var, exact.var, allowed.var_off, "var")


def tree(things: Iterable[T], merge: Callable[[T, T], T], seed: int) -> T:
    """All merged, in an order and by a tree that the seed tells."""
    rng = np.random.default_rng(seed)
    left = list(things)
    while len(left) > 1:
        i, j = rng.permutation(len(left))[:2]
        both = merge(left[i], left[j])
        left = [thing for k, thing in enumerate(left) if k not in (i, j)] + [both]
    return left[0]


def bits(m: Moments) -> bytes:
    """All that they are."""
    return repr((m.count, m.effective_count, m.mean.dtype)).encode() + m.to_array().tobytes()


@st.composite
def divided(draw: st.DrawFn) -> list[Array]:
    """Parts of any sizes, 0 and 1 among them, near together or apart, of any mean promised."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 300]), min_size=1, max_size=7))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    drift, scale = draw(st.sampled_from([0, 1, 1000])), draw(st.sampled_from([1, 1e-6, 1e6]))
    parts = [rng.normal(drift * i, 1, (n, CHANNELS)) for i, n in enumerate(sizes)]
    least = min((part.std(0).min() for part in parts if len(part) > 1), default=1.0)
    far = least * draw(st.sampled_from([0, 1, -1e3, FARTHEST[dtype] / 2, -FARTHEST[dtype] / 2]))
    given = [(scale * (part + far)).astype(dtype) for part in parts]
    found = [known(part) for part in given]
    limit = FARTHEST[dtype]
    assume(all((abs(k.mean) <= limit * np.sqrt(k.var))[k.var > 0].all() for k in found))
    return given


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize("shape", [(7, 3), (4, 5, 6, 7), (1, 3), (2, 3, 1)], ids=str)
def test_of_an_array(shape: tuple[int, ...], dtype: Any, layout: str) -> None:
    """They have the bits of `moments`, and the number of values of a channel."""
    x = to_layout(np.random.default_rng(0).normal(3, 2, shape), layout).astype(dtype)
    got, expected = Moments.of(x, layout=layout), fastbn.moments(x, layout=layout)
    assert_same_bits({"mean": got.mean, "var": got.var}, expected._asdict())
    assert got.count == x.size // shape[1]
    assert type(got.count) is int


@each_backend
@pytest.mark.no_kernel
@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (4, 0)], ids=str)
def test_of_an_empty_array(shape: tuple[int, ...]) -> None:
    """There are no values, and zeros for all channels; such moments come and go as others do."""
    got = Moments.of(np.zeros(shape, np.float32))
    assert got.count == 0
    for m in (got, Moments.from_array(got.to_array()), Moments.from_sums(got.to_sums())):
        np.testing.assert_array_equal((m.mean, m.var), np.zeros((2, shape[1])), strict=True)


@each_backend
@given(divided(), st.integers(0, 99))
def test_merged_parts_are_the_whole(parts: list[Array], seed: int) -> None:
    """In any order and by any tree, within what their own bounds allow, and with the same bits
    again."""
    got = tree(map(Moments.of, parts), Moments.merge, seed)
    allowed = tree(map(known, parts), merged, seed)
    assert_known(got, known(np.concatenate(parts)), allowed)
    assert bits(tree(map(Moments.of, parts), Moments.merge, seed)) == bits(got)


@each_backend
@given(divided(), st.sampled_from(["nothing", "the whole's mean", "a part's mean", "float32"]))
def test_summed_parts_are_the_whole(parts: list[Array], near: str) -> None:
    """Sums about any vector, added up, keep what the docstring of `to_sums` promises."""
    moments, all_known = list(map(Moments.of, parts)), list(map(known, parts))
    whole = known(np.concatenate(parts))
    about = {
        "nothing": None,
        "the whole's mean": whole.mean.astype(np.float64),
        "a part's mean": next((m.mean for m in moments if m.count), np.ones(CHANNELS)),
        "float32": whole.mean.astype(np.float32),
    }[near]
    sums = reduce(np.add, (m.to_sums(about) for m in moments))
    got = Moments.from_sums(sums, about)
    assert (got.var >= 0).all()
    assert_known(got, whole, summed(all_known, whole, about))


def in_pairs(parts: list[Moments]) -> Moments:
    """Merged in pairs, and pairs of pairs."""
    while len(parts) > 1:
        parts = [reduce(Moments.merge, parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


@pytest.mark.parametrize("ratio", [0, 1e3, 1e6, 1e9, 1e12])
def test_a_thousand_parts(ratio: float) -> None:
    """What docs/numerics.md says of merging and of sums about a part's mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 8, 5)) + rng.normal(size=(1000, 1, 5)) + ratio * np.sqrt(2)
    mean, var = formulas.moments(wide(x.reshape(-1, 5), "NCHW"))
    parts, s = list(map(Moments.of, x)), np.sqrt(var)
    about = parts[0].mean
    sums = reduce(np.add, (part.to_sums(about) for part in parts))
    for got, merges in (
        (reduce(Moments.merge, parts), 999),
        (in_pairs(parts), 10),
        (Moments.from_sums(sums, about), 1),
    ):
        e = (merges + 1) * U * np.abs(mean)
        assert_within(got.mean, mean, e + 1e-12 * s, "mean")
        relative = merges * (e / s + (e / s) ** 2) + 1e-10
        assert_within(got.var, var, relative * var, "var")


def test_empty_parts_change_nothing() -> None:
    """On either side, merging with no values gives the moments themselves."""
    some, none = (
        Moments.of(np.array([[1.0, 7.0], [3.0, 7.0]])),
        Moments.of(np.zeros((0, 2), np.float32)),
    )
    assert some.merge(none) is some
    assert none.merge(some) is some
    assert none.merge(none).count == 0


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 + 0.1, 1e30, 1e-40, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_channels(dtype: Any, value: float) -> None:
    """However they are divided, their variance is exactly 0 and their mean the value; so it is of
    sums about the value."""
    parts = [Moments.of(np.full((n, 2), value, dtype)) for n in (3, 1, 0, 10, 7)]
    about = np.full(2, value, dtype)
    for got in (
        reduce(Moments.merge, parts),
        Moments.from_sums(sum(m.to_sums(about) for m in parts), about),  # type: ignore[arg-type]
    ):
        np.testing.assert_array_equal(got.var, np.zeros(2))
        np.testing.assert_array_equal(got.mean, about.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=str)
def test_what_is_not_finite_stays_in_its_channel(bad: list[float], dtype: Any) -> None:
    """Merged or summed, other channels keep their bits, and nothing warns."""
    x = np.random.default_rng(0).normal(size=(40, CHANNELS)).astype(dtype)
    tainted = x.copy()
    tainted[5 : 5 + 20 * len(bad) : 20, 1] = bad
    found = []
    for values in (x, tainted):
        parts = [Moments.of(values[i : i + 10]) for i in range(0, 40, 10)]
        with np.errstate(invalid="ignore"):
            sums = reduce(np.add, (m.to_sums() for m in parts))
        found.append((reduce(Moments.merge, parts), Moments.from_sums(sums)))
    for clean, got in zip(*found, strict=True):
        assert np.isnan(got.var[1])
        assert not np.isfinite(got.mean[1])
        for name in ("mean", "var"):
            expected, actual = getattr(clean, name), getattr(got, name)
            np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("count", [2, 3, 1000, 1.5])
def test_unbiased_variance(count: float) -> None:
    """It is var * count / (count - 1), rounded twice; what is too large is infinite, and nothing
    warns."""
    var = np.array([0.3, 1e-300, 0.0, 1.797e308, np.inf, np.nan])
    got = Moments(count, np.zeros(6), var).unbiased_var
    n = np.longdouble(count)
    exact = var[:3].astype(np.longdouble) * n / (n - 1)
    assert_within(got[:3], exact, U * exact, "unbiased_var")
    np.testing.assert_array_equal(got[3:], [np.inf, np.inf, np.nan])


@pytest.mark.parametrize(
    ("count", "effective", "words"),
    [
        (0, None, "count is 0"),
        (1, None, "count is 1"),
        (1.0, 1, "count is 1"),
        (0.5, None, "effective_count is 1"),
        (7.5, 1, "effective_count is 1"),
        (7.5, 1 + 1e-13, "effective_count is 1.0000000000001"),
    ],
)
def test_no_unbiased_variance(count: float, effective: float | None, words: str) -> None:
    """One value, whatever it weighs, has none; nor have several that count as one but for
    roundings."""
    one = Moments(count, np.zeros(2), np.ones(2), effective_count=effective)
    with pytest.raises(ValueError, match=rf"^{words}, expected more than 1: .* biased"):
        _ = one.unbiased_var


def test_unbiased_variance_of_what_weighs() -> None:
    """Its n is the effective number of values, whatever their weights add up to."""
    for count in (1e-300, 0.3, 1, 1e300):
        m = Moments(count, np.zeros(2), np.ones(2), effective_count=5)
        np.testing.assert_array_equal(m.unbiased_var, [1.25, 1.25])


ANY_WEIGHT = st.one_of(
    st.just(0.0), st.floats(0.01, 10), st.floats(0, 1e300), st.floats(0, 1e-300), st.just(5e-324)
)


def effective(weights: Iterable[float]) -> float:
    """Kish's n, from exact fractions; 0 where nothing weighs."""
    exact = [Fraction(w) for w in weights]
    squares = sum(w * w for w in exact)
    return float(sum(exact) ** 2 / squares) if squares else 0.0


@given(st.lists(st.tuples(ANY_WEIGHT, st.integers(0, 3)), min_size=1, max_size=30), st.data())
def test_effective_counts(weighed: list[tuple[float, int]], data: st.DataObject) -> None:
    """Of any weights, of samples with any number of places that count, they are (sum w)**2 /
    sum w**2; those of parts merge to the same."""
    weights = np.array([w for w, _ in weighed])
    where = np.arange(3) < np.array([[n] for _, n in weighed])
    x = np.random.default_rng(0).normal(size=(len(weighed), CHANNELS, 3))
    places = np.repeat(weights, where.sum(1))
    cut = data.draw(st.integers(0, len(weighed)))
    parts = [
        Moments.of(x[part], where=where[part, None], weights=weights[part])
        for part in (slice(cut), slice(cut, None))
    ]
    with np.errstate(all="raise"):
        whole = Moments.of(x, where=where[:, None], weights=weights)
    for m in (whole, parts[0].merge(parts[1])):
        np.testing.assert_allclose(m.effective_count, effective(places), rtol=1e-14)
        assert (m.effective_count <= 1) == (np.count_nonzero(places) <= 1)


@pytest.mark.parametrize("weight", [1.0, 0.1, 1 / 3, 7.7, 1e300, 1e-310, 5e-324])
@pytest.mark.parametrize("samples", [1, 3, 10, 20_000])
def test_effective_count_of_equal_weights(samples: int, weight: float) -> None:
    """It is exactly the number of values."""
    x = np.ones((samples, 2, 3))
    where = np.arange(3)[None, None] < 2
    weights = np.full(samples, weight)
    assert Moments.of(x, weights=weights).effective_count == 3 * samples
    assert Moments.of(x, weights=weights, where=where).effective_count == 2 * samples
    assert Moments.of(x[:, :, 0], weights=weights).effective_count == samples


@pytest.mark.parametrize("scale", [1.0, 2.0**400, 2.0**-400])
def test_weighed_parts_are_the_whole(scale: float) -> None:
    """However they come together; their unbiased variance is as numpy.cov has it."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(3, 2, (60, CHANNELS)), rng.exponential(size=60) ** 3
    expected = np.diag(np.cov(x.T, aweights=weights))
    places = [slice(10), slice(10, 11), slice(11, 11), slice(11, 60)]
    parts = [Moments.of(x[part], weights=scale * weights[part]) for part in places]
    arrays = [Moments.from_array(part.to_array()) for part in parts]
    for got in (Moments.of(x, weights=scale * weights), reduce(Moments.merge, arrays)):
        np.testing.assert_allclose(float(got.count), scale * weights.sum(), rtol=1e-14)
        np.testing.assert_allclose(got.effective_count, effective(weights), rtol=1e-14)
        np.testing.assert_allclose(got.unbiased_var, expected, rtol=1e-13)
    sums = reduce(np.add, (part.to_sums(parts[0].mean) for part in parts))
    np.testing.assert_allclose(sums[:2], [scale * weights.sum(), scale**2 * (weights @ weights)])
    summed = Moments.from_sums(sums, parts[0].mean)
    np.testing.assert_allclose(summed.unbiased_var, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_squared_weights_that_float64_cannot_hold(scale: float) -> None:
    """Sums of them are refused, and not taken for others; merging needs none. A part whose weights
    are far below those of the others adds what it weighs."""
    x = np.random.default_rng(0).normal(size=(8, CHANNELS))
    part, usual = Moments.of(x, weights=np.full(8, scale)), Moments.of(x + 1)
    assert part.merge(part).effective_count == 16
    assert Moments.from_array(part.to_array()) == part
    with pytest.raises(ValueError, match=r"^sums\[1\] is (0|inf).* multiply all weights|finite"):
        Moments.from_sums(part.to_sums() + part.to_sums())
    if scale < 1:
        got = Moments.from_sums(part.to_sums() + usual.to_sums())
        assert got.effective_count == got.count == 8


def test_counts_that_float64_cannot_add_up() -> None:
    """They are refused, as such a count is."""
    m = Moments(1e308, V, V)
    with pytest.raises(ValueError, match=r"^the sum of both counts is inf, expected"):
        m.merge(m)


def test_they_are_immutable() -> None:
    """Nothing can be set, deleted or written; the arrays given are copied."""
    mean, var = np.zeros(2), np.ones(2)
    m = Moments(3, mean, var)
    mean += 1
    var += 1
    before = bits(m)
    assert (m.mean == 0).all()
    assert (m.var == 1).all()
    for name in ("count", "effective_count", "mean", "var", "other"):
        with pytest.raises(AttributeError, match=f"^Moments cannot be changed: '{name}'"):
            setattr(m, name, 1)
        with pytest.raises(AttributeError, match=f"^Moments cannot be changed: '{name}'"):
            delattr(m, name)
    for made in (m, m.merge(m), Moments.from_array(m.to_array())):
        for array in (made.mean, made.var):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="cannot set WRITEABLE"):
                array.flags.writeable = True
    assert bits(m) == before


ODD = np.array([1.5, np.nan, -0.0]), np.array([0.0, np.nan, np.inf])


@pytest.mark.parametrize("effective", [None, 2.5])
@pytest.mark.parametrize(
    "again", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy]
)
def test_copies(again: Callable[[Moments], Moments], effective: float | None) -> None:
    """Pickled or copied they are the same, NaN included, and still read-only."""
    m = Moments(7, *ODD, effective_count=effective)
    got = again(m)
    assert got == m
    assert type(got) is Moments
    assert bits(got) == bits(m)
    assert not got.mean.flags.writeable


def test_repr() -> None:
    """It makes them; an effective count is shown where it is not the count."""
    for effective in (None, 2.5):
        m = Moments(7, np.zeros(2), np.ones(2), effective_count=effective)
        assert eval(repr(m), {"Moments": Moments, "array": np.array}) == m
        assert ("effective_count" in repr(m)) == (effective is not None)


class Labelled(Moments):
    """With an attribute of its own, and another constructor."""

    label: str

    def __init__(self, label: str, mean: Array) -> None:
        super().__init__(3, mean, mean)
        object.__setattr__(self, "label", label)


@pytest.mark.parametrize(
    "again", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy]
)
def test_copies_of_subclasses(again: Callable[[Labelled], Labelled]) -> None:
    """They stay what they are, with what they have added; and weak references to them work."""
    one = Labelled("block 1", np.ones(2))
    got = again(one)
    assert (type(got), got.label, bits(got)) == (Labelled, "block 1", bits(one))
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        got.mean.flags.writeable = True
    for each in (one, Moments(1, np.ones(2), np.ones(2))):
        assert weakref.ref(each)() is each


def test_equality() -> None:
    """Of the same values they are equal, whatever those came as; and they have no hash."""
    m = Moments(3, np.zeros(2), np.ones(2))
    assert m == Moments(3.0, np.zeros(2, np.float32), np.ones(2, ">f8"))
    for other in (
        Moments(4, m.mean, m.var),
        Moments(4, m.mean, m.var, effective_count=3),
        Moments(3, m.mean, m.var, effective_count=2.5),
        Moments(3, np.array([0.0, 1.0]), m.var),
        Moments(3, m.mean, np.array([1.0, 0.0])),
        Moments(3, np.zeros(1), np.ones(1)),
        (3, m.mean, m.var),
        None,
    ):
        assert m != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_no_values_have(value: float) -> None:
    """Moments of a count of 0 add nothing, whatever else they hold."""
    none, some = Moments(0, np.full(2, value), np.full(2, abs(value))), TWO
    assert none.merge(some) == some.merge(none) == some
    assert Moments.from_sums(none.to_sums() + some.to_sums()) == some
    np.testing.assert_array_equal(none.to_sums(V), np.zeros(6))


VALUES = st.floats(), st.one_of(st.floats(min_value=0), st.just(np.nan))
counts = st.one_of(st.integers(0, 2**53), st.floats(0, 1e300))


@st.composite
def moments(draw: st.DrawFn) -> Moments:
    """Of any values that moments may have, and any number of channels."""
    channels = draw(st.integers(0, 5))
    mean, var = (draw(hnp.arrays(float, channels, elements=values)) for values in VALUES)
    count = draw(counts)
    effective = draw(st.none() | st.floats(1, 1e300)) if count else None
    return Moments(count, mean, var, effective_count=effective)


@given(moments())
def test_an_array_and_back(m: Moments) -> None:
    """to_array and from_array lose nothing; whole counts come back as int."""
    array = m.to_array()
    assert array.shape == (2 + 2 * len(m.mean),)
    assert array.dtype == np.float64
    for form in (array, array.astype(">f8"), np.repeat(array, 2)[::2]):
        got = Moments.from_array(form)
        assert got.to_array().tobytes() == array.tobytes()
        assert got.count == m.count
        assert got.effective_count == m.effective_count
        assert type(got.count) is (int if m.count == int(m.count) else float)


@given(moments())
def test_plain_numbers_and_back(m: Moments) -> None:
    """to_dict and from_dict lose nothing on the way through JSON."""
    there = json.loads(json.dumps(m.to_dict()))
    assert Moments.from_dict(there) == m


@pytest.mark.parametrize("count", [2**53, 2**64, 1e300, 0.5])
def test_large_and_fractional_counts(count: float) -> None:
    """They are counts as any others."""
    m = Moments(count, np.ones(2), np.ones(2))
    for got in (Moments.from_array(m.to_array()), Moments.from_sums(m.to_sums())):
        assert got.count == float(count)
        np.testing.assert_array_equal((got.mean, got.var), (m.mean, m.var))
    assert m.merge(m).count == 2 * count


TWO = Moments.of(np.array([[1.0, 7.0], [3.0, 7.0]]))
Verb = Callable[..., object]
V = np.ones(2)


def having(effective: Any) -> Verb:
    """Moments of such an effective count."""
    return partial(Moments, effective_count=effective)


BAD: list[tuple[Verb, tuple[Any, ...], type[Exception], str]] = [
    (Moments, (-1, V, V), ValueError, "count is -1, expected a finite number, zero or more"),
    (Moments, (-0.5, V, V), ValueError, "count is -0.5, expected a finite number"),
    (Moments, (np.nan, V, V), ValueError, "count is nan, expected a finite number"),
    (Moments, (np.inf, V, V), ValueError, "count is inf, expected a finite number"),
    (Moments, (10**400, V, V), ValueError, r"count is 10*\.\.\., expected a finite"),
    (Moments, (True, V, V), TypeError, r"count is a bool \(True\), expected a number"),
    (Moments, (np.True_, V, V), TypeError, "count is a bool"),
    (Moments, ("2", V, V), TypeError, r"count is a str \('2'\), expected a number"),
    (Moments, (None, V, V), TypeError, "count is a NoneType"),
    (Moments, (V[:1], V, V), TypeError, "count is an ndarray"),
    (Moments, (2, [1.0], V), TypeError, r"mean is a list \(\[1.0\]\)"),
    (Moments, (2, V.astype(int), V), TypeError, "mean has dtype int64, expected float16, bfl"),
    (Moments, (2, np.ma.masked_array(V), V), TypeError, "mean is a numpy.ma.MaskedArray"),
    (Moments, (2, V[None], V), ValueError, r"mean has shape \(1, 2\), expected rank 1"),
    (Moments, (2, V, None), TypeError, "var is a NoneType"),
    (Moments, (2, V, V[:1]), ValueError, r"var has shape \(1,\) but mean has 2 channels"),
    (
        Moments,
        (2, V, V - [0, 2]),
        ValueError,
        r"var\[1\] is -1.0: a variance cannot .* channel 1's",
    ),
    (having(True), (2, V, V), TypeError, "effective_count is a bool"),
    (having("2"), (2, V, V), TypeError, "effective_count is a str"),
    (having(np.nan), (2, V, V), ValueError, "effective_count is nan, expected a finite number"),
    (having(np.inf), (2, V, V), ValueError, "effective_count is inf, expected a finite number"),
    (having(0), (2, V, V), ValueError, "effective_count is 0, expected 1 or more where count is 2"),
    (
        having(0.9),
        (2, V, V),
        ValueError,
        "effective_count is 0.9, expected 1 or more where",
    ),
    (having(1), (0, V, V), ValueError, "effective_count is 1, expected 0 where count is 0"),
    (Moments.of, ([[1.0]],), TypeError, "x is a list"),
    (Moments.of, (V,), ValueError, "x has rank 1"),
    (partial(Moments.of, layout="HW"), (V[None],), ValueError, "layout is 'HW', expected 'NCHW'"),
    (TWO.merge, (None,), TypeError, "other is a NoneType .*, expected Moments"),
    (TWO.merge, ((2, V, V),), TypeError, r"other is a tuple .*, .* fastbn.Moments.of\(x\)"),
    (TWO.merge, (Moments(2, V[:1], V[:1]),), ValueError, "other has 1 channels, expected 2"),
    (TWO.merge, (Moments(0, V[:1], V[:1]),), ValueError, "other has 1 channels, expected 2"),
    (Moments.from_array, (np.array([2.0, 2, 0, -1]),), ValueError, r"var\[0\] is -1.0"),
    (Moments.from_array, (np.array([2.0, 0, 0, 1]),), ValueError, "effective_count is 0, expected"),
    (Moments.from_dict, ({"count": 2},), ValueError, "given is a dict .*, expected a dictionary"),
    (Moments.from_dict, (TWO.to_dict() | {"var": [1.0, -1.0]},), ValueError, r"var\[1\] is -1.0"),
    (Moments.from_sums, (np.array([2.0, 0, 0, 1]),), ValueError, r"sums\[1\] is 0 where sums\[0\]"),
    (Moments.from_sums, (np.array([2.0, 5, 0, 1]),), ValueError, r"sums\[1\] is 5 where sums\[0\]"),
    (Moments.from_sums, (np.array([0.0, 1, 0, 0]),), ValueError, r"sums\[1\] is 1 where sums\[0\]"),
    (TWO.to_sums, (np.ones(3),), ValueError, r"about has shape \(3,\) but the moments have 2 chan"),
    (Moments.from_sums, (np.ones(6), V[:1]), ValueError, r"about has shape \(1,\) but the moments"),
    (TWO.to_sums, ([0.0],), TypeError, r"about is a list \(\[0.0\]\)"),
]


@pytest.mark.parametrize(("verb", "given", "error", "message"), BAD)
def test_bad_arguments(
    verb: Verb, given: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """A clear error says what is wrong with them."""
    with pytest.raises(error, match=f"^{message}"):
        verb(*given)


@pytest.mark.parametrize("name", ["array", "sums"])
@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        (np.ones(5), ValueError, r" has shape \(5,\), expected \(2 \+ 2 \* channels,\)"),
        (np.ones(0), ValueError, r" has shape \(0,\), expected"),
        (np.ones((4, 1)), ValueError, r" has shape \(4, 1\), expected"),
        (np.ones(6, int), TypeError, " has dtype int64, expected float32 or float64"),
        ([2.0], TypeError, r" is a list \(\[2.0\]\), expected"),
        (np.array([-1.0, 1, 0, 0]), ValueError, r"\[0\] is -1, expected a finite number"),
        (np.array([1.0, -1, 0, 0]), ValueError, r"\[1\] is -1, expected a finite number"),
        (np.full(4, np.nan), ValueError, r"\[0\] is nan, expected a finite number"),
        (np.full(4, np.inf), ValueError, r"\[0\] is inf, expected a finite number"),
    ],
)
def test_bad_flat_arrays(name: str, flat: Any, error: type[Exception], message: str) -> None:
    """What neither to_array nor to_sums gives is refused."""
    with pytest.raises(error, match=f"^{name}{message}"):
        getattr(Moments, f"from_{name}")(flat)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Array], str]:
    """Batches of unequal sizes, one value and none among them, and their layout."""
    layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 7, 40]), max_size=6))
    size = draw(st.sampled_from([1, 4]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = [(n, CHANNELS, size) for n in [*sizes, 5]]
    return [to_layout(rng.normal(9, 3, shape), layout).astype(dtype) for shape in shapes], layout


@each_backend
@given(batches())
def test_exact_population(given: tuple[list[Array], str]) -> None:
    """The statistics of all values together, unbiased, from a generator too."""
    arrays, layout = given
    got = fastbn.population_statistics((x for x in arrays), layout=layout)
    whole = known(np.concatenate(arrays), layout)
    allowed = reduce(merged, (known(x, layout) for x in arrays))
    factor = np.longdouble(whole.count) / (whole.count - 1)
    exact = factor * whole.var
    assert got.count == whole.count
    assert got.mean.dtype == got.var.dtype == np.float64
    assert_within(got.mean, whole.mean, allowed.mean_off, "mean")
    assert_within(got.var, exact, factor * allowed.var_off * (1 + U) + U * exact, "var")


@each_backend
@given(batches())
def test_average_population(given: tuple[list[Array], str]) -> None:
    """E[mean_B] and E[m / (m - 1) var_B], every batch with the same weight: Algorithm 2, step 10.

    A value goes through as many roundings as there are batches, and two more.
    """
    arrays, layout = given
    arrays = [x for x in arrays if x.size != CHANNELS]
    got = fastbn.population_statistics(iter(arrays), layout=layout, method="average")
    found = [k for k in (known(x, layout) for x in arrays) if k.count]
    factors = [np.longdouble(k.count) / (k.count - 1) for k in found]
    assert got.count == sum(k.count for k in found)
    for name, values, offs in (
        ("mean", [k.mean for k in found], [k.mean_off for k in found]),
        (
            "var",
            [f * k.var for f, k in zip(factors, found, strict=True)],
            [f * k.var_off for f, k in zip(factors, found, strict=True)],
        ),
    ):
        size = np.mean(np.abs(values) + offs, 0)
        bound = np.mean(offs, 0) + (len(found) + 2) * U * size
        assert_within(getattr(got, name), np.mean(values, 0), bound, name)


@pytest.mark.parametrize("method", ["exact", "average"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_populations_with_values_that_are_not_finite(value: float, method: str) -> None:
    """They stay in their channel, and nothing warns."""
    x = np.random.default_rng(0).normal(size=(2, 8, CHANNELS))
    clean = fastbn.population_statistics(x, method=method)
    x[:, 3, 1] = value, -value
    got = fastbn.population_statistics(x, method=method)
    assert np.isnan([got.mean[1], got.var[1]]).all()
    for name in ("mean", "var"):
        expected, actual = getattr(clean, name), getattr(got, name)
        np.testing.assert_array_equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("method", ["exact", "average"])
def test_too_large_a_population_variance(method: str) -> None:
    """It is infinite, and nothing warns."""
    x = np.array([[1.3e154], [-1.3e154]])
    assert fastbn.population_statistics([x], method=method).var == np.inf


def test_a_population_is_the_callers() -> None:
    """What is given may be written, and belongs to nobody else."""
    x = np.random.default_rng(0).normal(size=(2, 8, CHANNELS))
    got = fastbn.population_statistics(x)
    expected = got.mean.copy()
    got.mean[...] = got.var[...] = 0
    np.testing.assert_array_equal(fastbn.population_statistics(x).mean, expected)


ONE, FIVE, NONE = np.ones((1, 3)), np.ones((5, 3)), np.ones((0, 3))

BAD_POPULATIONS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "batches had no batch with values"),
    ([NONE, NONE], {}, ValueError, "batches had no batch with values"),
    ([NONE], {"method": "average"}, ValueError, "batches had no batch with values"),
    ([ONE], {}, ValueError, "count is 1, expected more than 1"),
    ([FIVE, ONE], {"method": "average"}, ValueError, "count is 1, expected more than 1"),
    (
        [FIVE],
        {"method": "mean"},
        ValueError,
        "method is 'mean', expected one of 'exact', 'average'",
    ),
    ([FIVE], {"method": None}, TypeError, "method is None, expected one of"),
    ([FIVE], {"layout": "nchw"}, ValueError, "layout is 'nchw'"),
    ([FIVE, np.ones((5, 2))], {}, ValueError, "other has 2 channels, expected 3"),
    ([FIVE, np.ones((0, 2))], {}, ValueError, "other has 2 channels, expected 3"),
    ([FIVE, [1.0]], {}, TypeError, "x is a list"),
    (5, {}, TypeError, r"batches is an int \(5\), expected an iterable of batches; pass \[batch\]"),
    (None, {}, TypeError, "batches is a NoneType"),
]


@pytest.mark.parametrize(("arrays", "options", "error", "message"), BAD_POPULATIONS)
def test_bad_populations(
    arrays: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A clear error says what is wrong with them."""
    with pytest.raises(error, match=f"^{message}"):
        fastbn.population_statistics(arrays, **options)
