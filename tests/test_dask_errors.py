"""What fastbn.dask refuses, and that it does so before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import Standardizer
from support.processes import error

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
import fastbn.dask  # noqa: E402

X = da.zeros((4, 3, 5), chunks=2, dtype="f4")
M, V = np.zeros(3), np.ones(3)
normalize: Any = fastbn.dask.normalize
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "NumPy": (lambda: normalize(np.zeros((4, 3)), M, V), "x is an ndarray.*from_array"),
    "None": (lambda: fastbn.dask.moments(None), "x is a NoneType"),
    "unknown sizes": (
        lambda: fastbn.dask.moments(X[:, :, 0][X[:, 0, 0] > 0]),
        r"x has chunks of unknown size along axis 0 .*compute_chunk_sizes",
    ),
    "unknown sizes beside": (
        lambda: normalize(X, M, V, residual=X[X[:, 0, 0] > 0]),
        "residual has chunks of unknown size",
    ),
    "type": (lambda: fastbn.dask.moments(X.astype(int)), "x has dtype int64"),
    "masked": (lambda: fastbn.dask.moments(da.ma.masked_equal(X, 0)), "x is a numpy.ma.Masked"),
    "rank": (lambda: normalize(X[:, 0, 0], M, V), "x has rank 1"),
    "layout": (lambda: fastbn.dask.moments(X, layout="CHW"), "layout is 'CHW'"),
    "channels": (lambda: normalize(X, M[:2], V), r"mean has shape \(2,\) but x has 3 channels"),
    "the other layout": (lambda: normalize(X, np.zeros(5), V), "pass layout='NHWC'"),
    "variance": (lambda: normalize(X, M, -V), r"var\[0\] is -1"),
    "a lazy mean": (lambda: normalize(X, X.mean((0, 2)), V), r"mean is an Array.*mean.compute\(\)"),
    "eps": (lambda: normalize(X, M, V, eps=-1), "eps is -1"),
    "activation": (lambda: normalize(X, M, V, activation="gelu"), "activation is 'gelu'"),
    "residual's shape": (lambda: normalize(X, M, V, residual=X[:1]), "residual has shape"),
    "residual's type": (lambda: normalize(X, M, V, residual=X.astype(float)), "residual has dtype"),
    "where's shape": (lambda: normalize(X, M, V, where=X > 0), "where has shape"),
    "where's type": (lambda: normalize(X, M, V, where=X[:, :1]), "where has dtype float32"),
    "dtype": (lambda: normalize(X, M, V, dtype=float), "dtype is float64"),
    "out_layout": (
        lambda: normalize(X, M, V, residual=X, out_layout="NHWC"),
        "out_layout is 'NHWC'.*residual is given",
    ),
    "nothing": (lambda: fastbn.dask.standardize(X[:0]), "x has no values"),
    "no data": (lambda: Standardizer.of(X[:0]), "batches has no values"),
    "a data frame's": (lambda: Standardizer.of(X[X[:, 0, 0] > 0]), "batches has chunks of unknown"),
    "dtype before a pass": (lambda: fastbn.dask.standardize(X, dtype=float), "dtype is float64"),
    "channels of one": (lambda: Standardizer(M[:2], V[:2])(X), "x has 3 channels.*expected 2, as"),
    "out": (lambda: Standardizer(M, V)(X, out=np.zeros(X.shape)), "out is an ndarray"),
    "integers": (lambda: Standardizer(M, V).inverse(X.astype("u1")), "y has dtype uint8"),
    "elsewhere": (lambda: fastbn.normalize(X, M, V), r"x is an Array.*functions of fastbn.dask"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """At once: before anything is computed."""
    call, message = REFUSED[name]
    with (
        dask.config.set(scheduler=lambda *_, **__: pytest.fail("something was computed")),
        pytest.raises((TypeError, ValueError), match=message),
    ):
        call()


def test_scaler_refuses() -> None:
    scaler_of = pytest.importorskip("fastbn.sklearn").StandardScaler
    x = da.from_array(np.random.default_rng(0).normal(size=(40, 3)), chunks=(30, 1))
    fitted = scaler_of().fit(x)
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: fitted.fit(da.where(x == x[35], np.inf, x)), "infinity in column 0"),
        (lambda: fitted.transform(x[:, :2]), "2 features"),
        (lambda: fitted.fit(x[:0]), r"X has no values"),
        (lambda: fitted.fit(x[:, 0]), r"X has rank 1"),
        (lambda: fitted.fit(x.astype("U5")), "X has dtype <U5, expected numbers"),
        (lambda: fitted.fit(x[x[:, 0] > 0]), r"X has chunks of unknown size along axis 0"),
    ]
    before = fitted.mean_
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()
        assert fitted.mean_ is before


def test_without_dask() -> None:
    code = "import sys; sys.modules['dask'] = None; import fastbn; import fastbn.dask"
    assert 'pip install "fastbn[dask]"' in error(code).splitlines()[-1]
