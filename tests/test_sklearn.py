"""StandardScaler as scikit-learn's, and where it is better; ColumnMoments beneath it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import fastbn
from fastbn import ColumnMoments
from support.variants import each_backend

preprocessing = pytest.importorskip("sklearn.preprocessing")
from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from fastbn.sklearn import StandardScaler  # noqa: E402

Array = NDArray[Any]
Theirs: Any = preprocessing.StandardScaler
RNG = np.random.default_rng(0)
FITTED = ("mean_", "var_", "scale_", "n_samples_seen_")
OPTIONS = [
    {"with_mean": with_mean, "with_std": with_std}
    for with_mean in (True, False)
    for with_std in (True, False)
]


def table(dtype: Any = np.float64, missing: bool = False) -> Array:
    x = RNG.normal([3, -50, 0, 1e-3, 7], [1, 20, 5, 1e-4, 2], (300, 5))
    if missing:
        x[RNG.random(x.shape) < 0.2] = np.nan
        x[:, 2] = RNG.normal(size=300)
    return x.astype(dtype)


@parametrize_with_checks([StandardScaler(), StandardScaler(with_mean=False)])  # type: ignore[untyped-decorator]
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@each_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_as_theirs(dtype: Any, weighs: bool, missing: bool, options: dict[str, Any]) -> None:
    """Fitted at once and in parts, there and back."""
    x = table(dtype, missing)
    weight = RNG.uniform(0.5, 2, len(x)) if weighs else None
    rtol = 1e-12 if dtype == np.float64 else 1e-5
    ours, theirs, parts = StandardScaler(**options), Theirs(**options), StandardScaler(**options)
    ours.fit(x, sample_weight=weight)
    theirs.fit(x.astype(np.float64), sample_weight=weight)
    for some in np.array_split(np.arange(len(x)), 7):
        parts.partial_fit(x[some], sample_weight=None if weight is None else weight[some])
    # Theirs counts rows, whatever they weigh, where it neither centres nor scales.
    names = FITTED[:3] if weighs and not any(options.values()) else FITTED
    for fitted in (ours, parts):
        for name in names:
            expected = getattr(theirs, name)
            if expected is None:
                assert getattr(fitted, name) is None
            else:
                np.testing.assert_allclose(getattr(fitted, name), expected, rtol=1e-7)
    y = ours.transform(x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, theirs.transform(x.astype(np.float64)), rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(y, StandardScaler(**options).fit_transform(x, None, weight))
    back = ours.inverse_transform(y)
    np.testing.assert_allclose(back, x, rtol=rtol, atol=rtol * 100)


@each_backend
def test_right_where_theirs_is_not() -> None:
    """float32 with a mean of 1e4: the truth is a fit of the same numbers in float64."""
    x = (1e4 + RNG.normal(size=(5000, 3))).astype(np.float32)
    true = x.astype(np.float64)
    ours = StandardScaler().fit(x)
    for got, expected in ((ours.mean_, true.mean(0)), (ours.var_, true.var(0))):
        assert got is not None
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@each_backend
def test_constant_columns() -> None:
    """Divided by 1 where the variance is 0, and only there."""
    x = np.full((50, 2), 1e8)
    x[0, 1] += 1e-7
    fitted: Any = StandardScaler().fit(x)
    assert fitted.var_[0] == 0
    assert fitted.scale_.tolist() == [1.0, np.sqrt(fitted.var_[1])]
    assert (fitted.transform(x)[:, 0] == 0).all()


@each_backend
def test_merge() -> None:
    x = table(missing=True)
    parts = [StandardScaler().fit(some) for some in np.array_split(x, 3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = StandardScaler().fit(x)
    for name in FITTED:
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_allclose(merged.transform(x), whole.transform(x), rtol=1e-12)


@each_backend
def test_in_place() -> None:
    for order in ("C", "F"):
        x: Array = np.array(table(), order=order)
        expected = StandardScaler().fit_transform(x)
        scaler = StandardScaler(copy=False).fit(x)
        y = scaler.transform(x)
        assert y is x
        np.testing.assert_array_equal(y, expected)
        assert scaler.inverse_transform(x, copy=True) is not x


def test_frames_and_names() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table(), columns=list("abcde"))
    scaler = StandardScaler().set_output(transform="pandas").fit(frame)
    assert list(scaler.feature_names_in_) == list(scaler.get_feature_names_out()) == list("abcde")
    assert list(scaler.transform(frame).columns) == list("abcde")


def test_copies() -> None:
    scaler = StandardScaler(with_mean=False).fit(table(missing=True))
    other = pickle.loads(pickle.dumps(scaler))
    other.partial_fit(table())
    assert not hasattr(clone(scaler), "scale_")
    np.testing.assert_array_equal(other.n_samples_seen_, np.asarray(scaler.n_samples_seen_) + 300)


def test_a_failing_fit_changes_nothing() -> None:
    """Infinity, another number of columns, bad weights."""
    x = table()
    bad = x.copy()
    bad[7, 3] = np.inf
    scaler = StandardScaler().fit(x)
    before = pickle.dumps(scaler)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: scaler.fit(bad), "infinity in column 3"),
        (lambda: scaler.partial_fit(bad), "infinity in column 3"),
        (lambda: scaler.fit_transform(bad), "infinity in column 3"),
        (lambda: scaler.partial_fit(x[:, :2]), "2 features"),
        (lambda: scaler.fit(x, sample_weight=np.ones(3)), "sample_weight"),
        (lambda: scaler.fit("table"), "table"),
        (lambda: scaler.transform(bad), "infinity in column 3"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
        assert pickle.dumps(scaler) == before
    fresh = StandardScaler()
    with pytest.raises(ValueError, match="infinity"):
        fresh.fit(bad)
    assert vars(fresh) == vars(StandardScaler())
    with pytest.raises(NotFittedError):
        fresh.transform(x)
    sparse: Any = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"X is a sparse .*MaxAbsScaler"):
        scaler.fit(sparse.csr_array(x))
    with pytest.raises(TypeError, match="with_mean is"):
        StandardScaler(with_mean="yes").fit(x)  # type: ignore[arg-type]


# ---- ColumnMoments ----


@each_backend
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 99), st.booleans(), st.booleans())
def test_columns(rows: int, columns: int, seed: int, weighs: bool, last: bool) -> None:
    """Those of NumPy without NaN, whole and merged, columns without any value too."""
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 2, (rows, columns))
    x[rng.random(x.shape) < rng.choice([0, 0.1, 0.6])] = np.nan
    if last:
        x[:, -1] = np.nan
    weights = rng.uniform(0.5, 2, rows) if weighs else None
    w = np.where(np.isnan(x), 0, 1.0 if weights is None else weights[:, None])
    count = w.sum(0)
    known = np.where(count == 0, 1, count)
    mean = (w * np.nan_to_num(x)).sum(0) / known
    var = (w * np.square(np.nan_to_num(x) - mean)).sum(0) / known
    cut = rows // 2
    parts = [
        ColumnMoments.of(x[some], weights=None if weights is None else weights[some])
        for some in (slice(0, cut), slice(cut, rows))
    ]
    for got in (ColumnMoments.of(x, weights=weights), parts[0].merge(parts[1])):
        np.testing.assert_allclose(got.count, count, rtol=1e-13)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got.var, var, rtol=1e-10, atol=1e-12)
        y = fastbn.normalize(x, got.mean, got.var)
        assert (np.isnan(y) == np.isnan(x)).all()


def test_columns_are_plain_numbers() -> None:
    found = ColumnMoments.of(table(missing=True))
    there = json.loads(json.dumps(found.to_dict()))
    assert ColumnMoments.from_dict(there) == found == pickle.loads(pickle.dumps(found))
    assert found != ColumnMoments.of(table())
    assert found != 3
    with pytest.raises(AttributeError, match="ColumnMoments cannot be changed"):
        found.mean = found.var
    for count, message in (([1, -1], r"count is -1\.0 in column 1"), ([np.nan, 1], "count is nan")):
        with pytest.raises(ValueError, match=message):
            ColumnMoments(np.array(count, float), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="x has rank 3"):
        ColumnMoments.of(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="other has 5 channels, expected 2"):
        ColumnMoments.of(np.zeros((3, 2))).merge(found)
