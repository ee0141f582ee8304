"""NaN, infinity, no variance, no eps, and the ends of the number range."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import fastbn
from oracle.arrays import DTYPES, LAYOUTS, Array, channel_axis, rows, to_layout
from support.bits import Results, assert_same_bits, of_channels, run_all
from support.judge import check_backward, check_everything, check_forward
from support.pairs import paired
from support.variants import Variant, each_backend

CHANNELS = 19


def batch(dtype: Any, layout: str, seed: int = 0) -> Array:
    """A (4, 19, 3, 5) batch in `layout`."""
    values = np.random.default_rng(seed).normal(1, 2, (4, CHANNELS, 3, 5))
    return to_layout(values, layout).astype(dtype)


def channel(a: Array, c: int, layout: str) -> tuple[Any, ...]:
    """An index of the values of one channel."""
    index: list[Any] = [slice(None)] * a.ndim
    index[channel_axis(a.ndim, layout)] = c
    return tuple(index)


def assert_same_elsewhere(results: Results, expected: Results, c: int, layout: str) -> None:
    """All channels but one have the same bits."""
    others = np.arange(CHANNELS) != c
    assert_same_bits(of_channels(results, others, layout), of_channels(expected, others, layout))


@paired(
    name=["x", "dy", "gamma", "beta"],
    poison=[np.nan, np.inf, -np.inf],
    layout=LAYOUTS,
    dtype=DTYPES,
)
def test_nan_and_infinity_stay_in_their_channel(
    variant: Variant, dtype: Any, layout: str, name: str, poison: float
) -> None:
    """One bad value changes no bit of any other channel, in any result."""
    gamma, beta = np.random.default_rng(1).normal(size=(2, CHANNELS))
    clean = {"x": batch(dtype, layout), "dy": batch(dtype, layout, 9), "gamma": gamma, "beta": beta}
    expected = run_all(**clean, layout=layout)
    for c in (0, 8, CHANNELS - 1):
        for place in (0, -1):
            arrays = {key: a.copy() for key, a in clean.items()}
            if arrays[name].ndim == 1:
                arrays[name][c] = poison
            else:
                values = arrays[name][channel(arrays[name], c, layout)]
                values[np.unravel_index(place % values.size, values.shape)] = poison
            results = run_all(**arrays, layout=layout)
            assert_same_elsewhere(results, expected, c, layout)
            if name == "x":
                assert not np.isfinite(results["mean"][c])
                assert np.isnan(results["var"][c])
                assert np.isnan(results["y"][channel(results["y"], c, layout)]).all()
            if name in ("x", "dy"):
                dx = results["batch_norm_backward(params=True).dx"]
                assert not np.isfinite(dx[channel(dx, c, layout)]).any()


@pytest.mark.parametrize("size", [1e-200, 1e160, 1e300, 1.7e308])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_out_of_range_stays_in_its_channel(
    variant: Variant, layout: str, size: float
) -> None:
    """A variance that is no float64 leaves y = beta or NaN, and no trace in other channels."""
    x, dy = batch(np.float64, layout), batch(np.float64, layout, 9)
    beta = np.random.default_rng(1).normal(size=CHANNELS)
    expected = run_all(x, dy, None, beta, eps=0.0, layout=layout)
    where = channel(x, 8, layout)
    x[where] = size * np.sign(x[where])
    results = run_all(x, dy, None, beta, eps=0.0, layout=layout)
    assert_same_elsewhere(results, expected, 8, layout)
    y = results["y"][where]
    assert results["var"][8] == 0 if size < 1 else not np.isfinite(results["var"][8])
    assert ((y == beta[8]) | np.isnan(y)).all()
    dy[where] = np.finfo(np.float64).max * np.sign(dy[where])
    results = run_all(batch(np.float64, layout), dy, None, beta, eps=0.0, layout=layout)
    assert_same_elsewhere(results, expected, 8, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_given_statistics_stays_in_its_channel(
    variant: Variant, dtype: Any, layout: str
) -> None:
    """A NaN mean (normalize) and a NaN var (batch_norm_backward) reach their channel alone."""
    x, dy = batch(dtype, layout), batch(dtype, layout, 9)
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    bad = np.where(np.arange(CHANNELS) == 8, np.nan, 1.0)
    y = fastbn.normalize(x, mean + bad, var, layout=layout)
    plain = fastbn.normalize(x, mean + 1, var, layout=layout)
    dx = fastbn.batch_norm_backward(dy, x, mean, var * bad, layout=layout).dx
    plain_dx = fastbn.batch_norm_backward(dy, x, mean, var, layout=layout).dx
    for got, expected in ((y, plain), (dx, plain_dx)):
        where = channel(got, 8, layout)
        assert np.isnan(got[where]).all()
        got[where] = expected[where] = 0
        assert_same_bits({"": got}, {"": expected})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_zero(variant: Variant, dtype: Any, layout: str) -> None:
    """With eps = 0 everything is as right as ever."""
    check_everything(batch(dtype, layout), batch(dtype, layout, 9), eps=0.0, layout=layout)
    check_everything(batch(dtype, layout), batch(dtype, layout, 9), eps=0, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_variance_and_no_eps(variant: Variant, dtype: Any, layout: str) -> None:
    """Where var + eps is 0: y = beta, dx = 0, dgamma = 0, dbeta = sum(dy); others are untouched."""
    x, dy = batch(dtype, layout), batch(dtype, layout, 9)
    flat = [0, 8, CHANNELS - 1]
    for c in flat:
        x[channel(x, c, layout)] = 0.1 * c - 3
    gamma, beta = np.random.default_rng(1).normal(size=(2, CHANNELS)).astype(dtype)
    check_everything(x, dy, gamma, beta, eps=0.0, layout=layout)
    results = run_all(x, dy, gamma, beta, eps=0.0, layout=layout)
    for c in flat:
        assert results["var"][c] == 0
        for name in ("y", "normalize"):
            assert (results[name][channel(x, c, layout)] == beta[c]).all()
        for name, a in results.items():
            if name.endswith("dx"):
                assert (a[channel(x, c, layout)] == 0).all()
            if name.endswith("dgamma"):
                assert a[c] == 0
    # By given statistics the rule is the same, however far x is from the mean; -0.0 is 0 too.
    for zero in (0.0, -0.0):
        var = np.full(CHANNELS, zero)
        y = fastbn.normalize(x, var, var, gamma, beta, eps=0.0, layout=layout)
        np.testing.assert_array_equal(rows(y, layout), beta[:, None] + 0 * rows(x, layout))
        got = fastbn.normalize_backward(dy, x, var, var, gamma, eps=0.0, layout=layout)
        assert got.dgamma is not None
        assert not got.dx.any()
        assert not got.dgamma.any()


@paired(
    value=[0.1, -1 / 3, 1e6 + 0.1, 1e30, 3e38, 1e-30, 1e-40, 0.0],
    shape=[(1, 1), (7, 3), (3, 2, 5, 7), (2, 17, 33), (40, 3, 50, 51)],
    dtype=DTYPES,
)
def test_constant_channels_have_no_variance(
    variant: Variant, dtype: Any, shape: tuple[int, ...], value: float
) -> None:
    """A constant channel's variance is exactly 0, its mean the value, its y exactly beta."""
    for layout in LAYOUTS:
        x = to_layout(np.full(shape, value), layout).astype(dtype)
        beta = np.linspace(-1, 1, shape[1])
        _, mean, var = check_forward(x, None, beta, layout=layout)
        constant = float(dtype(value))
        assert (var == 0).all()
        assert (abs(mean - constant) <= 2.0**-52 * abs(constant)).all()
        statistics = fastbn.moments(x, layout=layout)
        assert (statistics.var == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (1, 33, 1, 1), (1, 1, 1)], ids=str)
def test_one_value_a_channel(
    variant: Variant, shape: tuple[int, ...], dtype: Any, layout: str
) -> None:
    """One value is arithmetic like any other: mean is it, var = 0, y = beta, dgamma = 0."""
    x = to_layout(np.random.default_rng(0).normal(50, 9, shape), layout).astype(dtype)
    beta = np.linspace(-2, 2, shape[1]).astype(dtype)
    for eps in (1e-5, 0.0):
        y, mean, var = fastbn.batch_norm(x, None, beta, eps=eps, layout=layout)
        np.testing.assert_array_equal(mean, rows(x, layout)[:, 0])
        assert not var.any()
        np.testing.assert_array_equal(rows(y, layout)[:, 0], beta)
        got = fastbn.batch_norm_backward(x, x, mean, var, eps=eps, layout=layout)
        assert got.dgamma is not None
        assert not got.dgamma.any()
        assert eps > 0 or not got.dx.any()
        check_everything(x, x, None, beta, eps=eps, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_results(variant: Variant, layout: str) -> None:
    """y and dx may be subnormal: nothing is flushed to zero."""
    dy = (batch(np.float64, layout, 9) * 1e-10).astype(np.float32)
    gamma = np.full(CHANNELS, 1e-40)
    check_everything(batch(np.float32, layout), dy, gamma, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_pair_of_scales(variant: Variant, dtype: Any, layout: str) -> None:
    """The coefficients of dx hold 1/s twice: no pair of scales of x and dy costs a digit."""
    for scale in 10.0 ** np.arange(-16, 17, 4):
        x = (batch(np.float64, layout) * scale).astype(dtype)
        mean, var = fastbn.moments(x, layout=layout)
        for size in 10.0 ** np.arange(-30, 13, 3):
            if 1e-33 < size / scale < 1e33:
                dy = (batch(np.float64, layout, 9) * size).astype(dtype)
                check_backward(dy, x, mean, var, eps=0.0, layout=layout)


@paired(scale=[1e-36, 1e-25, 1e-15, 1e15, 1e20, 1e25, 1e36], dtype=DTYPES, layout=LAYOUTS)
def test_any_scale(variant: Variant, dtype: Any, scale: float, layout: str) -> None:
    """x and dy of any size: no coefficient under- or overflows where the results do not."""
    x = (batch(np.float64, layout) * scale).astype(dtype)
    _, mean, var = check_forward(x, eps=0.0, layout=layout)
    for size in (1e-30, 1.0, 1e30):
        dy = (batch(np.float64, layout, 9) * size).astype(dtype)
        to_one = np.full(CHANNELS, scale / size)  # this gamma makes dx of size 1
        gammas = [to_one, None] if 1e-30 <= size / scale <= 1e30 else [to_one]
        for gamma in gammas:
            for frozen in (False, True):
                check_backward(dy, x, mean, var, gamma, eps=0.0, layout=layout, frozen=frozen)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [0, 700_001])
def test_an_outlier_among_a_million(variant: Variant, place: int, layout: str) -> None:
    """The variance of a million values with one outlier needs a second pass, and has it."""
    values = np.random.default_rng(0).normal(1, 2, (1_000_003, 1)).astype(np.float32)
    values[place] = 1e30
    check_forward(values, layout=layout)
    check_forward(values.reshape(1, 1, -1) if layout == "NCHW" else values[None], layout=layout)


@each_backend
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_warning_comes_from_valid_data(variant: Variant, dtype: Any, swapped: bool) -> None:
    """Infinities that meet zeros, and sums and scales that overflow, in any kind of array."""
    x, dy = batch(dtype, "NCHW"), batch(dtype, "NCHW", 9)
    dy[0, 1, 0, 0] = np.inf
    if swapped:
        x, dy = (a.astype(a.dtype.newbyteorder("S")) for a in (x, dy))
    gamma, var = np.zeros(CHANNELS), np.full(CHANNELS, 1e-300)
    gamma[2], var[3], var[4] = 1e300, np.inf, np.finfo(np.float64).max
    zeros = np.zeros(CHANNELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbn.batch_norm(x, gamma, zeros)
        fastbn.normalize(x, zeros, var, gamma, eps=1e300)
        fastbn.batch_norm_backward(dy, x, zeros, var, gamma, eps=1e300)
        fastbn.batch_norm_backward(dy, x, zeros, var, gamma, eps=0.0)
        for params in (True, False):
            fastbn.normalize_backward(dy, x, zeros, var, gamma, eps=0.0, params=params)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_out_of_range_leaves_the_mean_alone(
    variant: Variant, dtype: Any, layout: str
) -> None:
    """Where x is its mean y is beta, and dy = 0 gives dx = 0, however large the scale."""
    x = to_layout(np.zeros((3, CHANNELS, 3, 7)), layout).astype(dtype)
    zeros, beta = np.zeros(CHANNELS), np.linspace(-1, 1, CHANNELS).astype(dtype)
    tiny = np.full(CHANNELS, 1e-200)
    y = fastbn.normalize(x, zeros, tiny, None, beta, eps=0.0, layout=layout)
    np.testing.assert_array_equal(rows(y, layout), np.repeat(beta[:, None], 63, 1))
    dx = fastbn.batch_norm_backward(x, x, zeros, tiny, eps=0.0, layout=layout).dx
    assert not dx.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_given_variance_leaves_beta(variant: Variant, dtype: Any) -> None:
    """var = infinity is a number of infinite size: y = beta, dx = 0."""
    x = batch(dtype, "NCHW")
    var, beta = np.full(CHANNELS, np.inf), np.linspace(-1, 1, CHANNELS).astype(dtype)
    y = fastbn.normalize(x, np.zeros(CHANNELS), var, None, beta)
    np.testing.assert_array_equal(rows(y, "NCHW"), np.repeat(beta[:, None], 60, 1))
    dx = fastbn.normalize_backward(x, None, np.zeros(CHANNELS), var, params=False).dx
    assert not dx.any()


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_values_that_are_not_finite(dtype: Any) -> None:
    """It is the mean, and y is beta; one that is not finite stays in its channel."""
    x = np.arange(-20, 20, dtype=dtype)[None] * np.finfo(dtype).smallest_subnormal
    beta = np.linspace(-2, 2, 40).astype(dtype)
    y, mean, var = fastbn.batch_norm(x, None, beta)
    np.testing.assert_array_equal(mean, x[0].astype(np.float64))
    np.testing.assert_array_equal(var, np.zeros(40))
    np.testing.assert_array_equal(y[0], beta)
    x[0, [3, 30]] = np.inf, np.nan
    found = fastbn.batch_norm(x, None, beta)
    for actual, usual in zip(found, (y, mean, var), strict=True):
        bad = np.isnan(actual).reshape(-1)
        assert list(np.flatnonzero(bad)) == [3, 30]
        np.testing.assert_array_equal(actual.reshape(-1)[~bad], usual.reshape(-1)[~bad])
